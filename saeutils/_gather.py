"""The inner loops of reading a store, compiled by numba; they hold no lock.

Rows from many memory-mapped shards go into one array with one copy.

numpy and torch index one array at a time, so rows spread over S shards would cost S
calls and a second copy to restore the order. Here each row is one memory copy from
the address where its shard is mapped.
"""

from typing import no_type_check

import numba
import numpy as np
from numba.core import cgutils, types
from numba.extending import intrinsic


@intrinsic
@no_type_check
def _pointer(typing_context, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


@numba.njit(nogil=True, cache=True)
@no_type_check  # a wrapped function cannot be compiled
def _copy_rows(addresses, starts, rows_per_shard, index, out):
    width = out.shape[1]
    last = len(addresses) - 1
    for i in range(len(index)):
        row = index[i]
        # Right at once when all shards are equally long, as they nearly always are.
        shard = min(row // rows_per_shard, last)
        while row < starts[shard]:
            shard -= 1
        while row >= starts[shard + 1]:
            shard += 1
        address = addresses[shard] + (row - starts[shard]) * width
        source = numba.carray(_pointer(address), (width,), np.uint8)
        for j in range(width):
            out[i, j] = source[j]


@numba.njit(nogil=True, cache=True)
@no_type_check
def permute(positions, tables, high_base, low_base, n, swap, out):
    """`order.Permutation` at each position: its Feistel network, and its swap."""
    inverse = 1.0 / low_base
    for i in range(len(positions)):
        x = positions[i]
        if swap and x < 2:
            x = 1 - x
        while True:
            # Division by way of floats: within 1 below 2**48, and much cheaper.
            high = np.int64(np.float64(x) * inverse)
            low = x - high * low_base
            over = np.int64(low >= low_base) - np.int64(low < 0)
            high, low = high + over, low - over * low_base
            for r in range(0, len(tables), 2):
                # Modulo the base, without a branch that would be guessed wrongly.
                high += tables[r, low]
                high -= high_base * np.int64(high >= high_base)
                if r + 1 < len(tables):
                    low += tables[r + 1, high]
                    low -= low_base * np.int64(low >= low_base)
            x = high * low_base + low
            if x < n:
                break
        out[i] = x


class ShardedRows:
    """Arrays (rows, d) of one dtype, C-contiguous, read as if laid end to end."""

    def __init__(self, shards: list[np.ndarray]) -> None:
        assert all(s.flags.c_contiguous and s.dtype == shards[0].dtype for s in shards)
        self._shards = shards  # keeps the addresses alive
        self._addresses = np.array([s.ctypes.data for s in shards], dtype=np.int64)
        self._starts = np.cumsum([0] + [len(s) for s in shards])

    def gather(self, index: np.ndarray, out: np.ndarray) -> None:
        """out[i] = row index[i]. The caller has checked 0 ≤ index < total."""
        assert out.flags.c_contiguous and out.dtype == self._shards[0].dtype
        assert index.dtype == np.int64 and len(index) == len(out)
        as_bytes = out.view(np.uint8).reshape(len(out), -1)
        per_shard = len(self._shards[0])
        _copy_rows(self._addresses, self._starts, per_shard, index, as_bytes)
