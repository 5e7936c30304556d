"""Rows of activations on disk or in memory, with the provenance of each row.

The format, version 1
---------------------
A store is a folder; it holds the activations of one hook point. All names inside
are relative, all numbers little-endian.

    manifest.json      what is here; replaced atomically after each shard
    00000.npy          rows 0 … of the store: one (rows, d_in) array, C order, npy 1.0
    00000.parquet      their provenance: one record a row, in the same order
    00001.npy …        the rows that follow
    .lock              held by the process that writes; no part of the data

manifest.json is UTF-8 JSON with these keys:

    format, version    "saeutils.activations", 1. A reader refuses a greater version
    complete           false while being written: the listed shards are whole and
                       right, but rows are missing at the end
    hook, d_in         name of the hook point, width of a row
    dtype, byteorder   "float32" (npy <f4), "float16" (<f2), or "bfloat16" (<u2: the
                       upper 16 bits of the float32); "little"
    rows               rows in the listed shards; `expected_rows` when complete, or null
    rows_per_shard     rows of each shard but the last
    model, data        fingerprints (sha256) of the model's weights and of the inputs
                       with their provenance; null when unknown
    seed, settings     as given by the writer
    columns            provenance column -> type (int64, float32, bool, string, …)
    shards             in order: {rows: how many, files: {rows: {file, bytes, sha256 (of
                       the whole file)}, provenance: {file, bytes, sha256}}}; without
                       provenance when there are no columns

Row i of the store is row i − (rows of the shards before) of its shard. Files that
the manifest does not list are leftovers. Values are finite, always. A store written
by several processes lists files in the folders part-RRRRR-of-WWWWW, each of which is a
store too (`saeutils.parts`). docs/formats.md says all this at more length.
"""

import hashlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from saeutils.context import Context, context
from saeutils.order import BufferShuffle, FullShuffle, Segment
from saeutils.sharded import ShardedStore
from saeutils.storage import Folder
from saeutils.store_writer import FORMAT, STORED, StoreWriter, as_stored

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "ActivationStore",
    "Batch",
    "Store",
    "StoreWriter",
    "TensorStore",
    "as_store",
]

Index = Tensor | np.ndarray | Sequence[int]
AHEAD = 2  # batches that a reading thread prepares beforehand


class Batch(NamedTuple):
    """Some rows, and the number of each in its store: provenance.iloc[index]."""

    rows: Float32[Tensor, "batch d_in"]
    index: Int64[Tensor, " batch"]


def check_batches(
    batch_size: int,
    rank: int,
    world_size: int,
    start: int,
    steps: int | None,
    workers: int,
) -> None:
    """Raises ValueError for numbers with which no batches can be read."""
    if min(batch_size, world_size) < 1 or not 0 <= rank < world_size:
        raise ValueError(
            f"batch_size {batch_size}, rank {rank} of world_size {world_size}: "
            "expected batch_size ≥ 1 and 0 ≤ rank < world_size"
        )
    if start < 0 or workers < 0 or (steps is not None and steps < 0):
        raise ValueError(
            f"start {start}, steps {steps}, workers {workers}: none may be negative"
        )


class Store(ABC):
    """The reading interface that rows on disk and rows in memory share.

    Attributes: `d_in` (width of a row), `dtype` (as stored), `hook` (name of the hook
    point, None when unknown). Rows come out as float32.
    """

    d_in: int
    dtype: torch.dtype
    hook: str | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def gather(self, index: Index) -> Float32[Tensor, "rows d_in"]:
        """The rows at `index`, in that order. Raises IndexError out of 0 … n − 1."""

    @abstractmethod
    def _read(self, start: int, out: Float32[Tensor, "rows d_in"]) -> None:
        """Fill `out` with the rows from `start` on."""

    @property
    @abstractmethod
    def provenance(self) -> "pd.DataFrame":
        """One record a row, in the order of the rows."""

    def records(self, start: int, stop: int) -> "pd.DataFrame":
        """The provenance of rows start … stop − 1."""
        return self.provenance.iloc[start:stop]

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of the stored rows and their provenance."""

    def context(
        self, row: int, before: int = 10, after: int = 10, **how: Any
    ) -> Context:
        """The text around a row's token, or its image and patch: see `context`."""
        return context(self, row, before, after, **how)

    def __getitem__(self, rows: slice) -> Float32[Tensor, "rows d_in"]:
        _check_step(rows)
        start, stop, _ = rows.indices(len(self))
        out = torch.empty(max(0, stop - start), self.d_in)
        self._read(start, out)
        return out

    def chunks(self, size: int) -> Iterator[Batch]:
        """All rows in order, `size` at a time, the last chunk short."""
        if size < 1:
            raise ValueError(f"chunks of {size} rows: expected at least 1")
        for start in range(0, len(self), size):
            rows = self[start : start + size]
            yield Batch(rows, torch.arange(start, start + len(rows)))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        steps: int | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: str = "full",
        block: int = 1024,
        blocks: int = 256,
        workers: int = 1,
    ) -> Iterator[Batch]:
        """Shuffled batches, in an order that depends on the seed and nothing else.

        The rows form an endless stream: a random permutation of all n (epoch 0),
        then another (epoch 1), … Batch s of rank r is
        stream[(s · world_size + r) · batch_size : + batch_size].

        steps: the step to stop before; None: one epoch, the last batch short, and
            possibly none for the last ranks.
        start: the step to begin at, for resuming; costs nothing, whatever it is.
        shuffle: "full", every order of rows equally likely; or "buffer", for disks
            where reading row by row is slow: `blocks` random blocks of `block`
            neighbouring rows are read and mixed in memory (as float32, twice).
        workers: threads that read ahead. 0 reads when asked. The batches are the
            same for any number.
        """
        n = len(self)
        check_batches(batch_size, rank, world_size, start, steps, workers)
        last = n if steps is None else steps * world_size * batch_size
        first, stride = (
            (start * world_size + rank) * batch_size,
            world_size * batch_size,
        )
        tasks = range(first, last, stride)
        if shuffle == "buffer":
            buffers = BufferShuffle(n, seed, block, blocks)
            return _buffered(self, buffers, tasks, batch_size, last)
        if shuffle != "full":
            raise ValueError(f'shuffle {shuffle!r}: expected "full" or "buffer"')
        order = FullShuffle(n, seed)

        def read(at: int) -> Batch:
            index = order(at, min(at + batch_size, last))
            return Batch(self.gather(index), torch.from_numpy(index))

        return _read_ahead(read, tasks, workers)


class ActivationStore(ShardedStore, Store):
    """A store on disk. Opening reads the manifest; rows are memory-mapped."""

    format = FORMAT

    def __init__(self, folder: Folder, manifest: dict[str, Any]) -> None:
        super().__init__(folder, manifest)
        self.d_in: int = manifest["d_in"]
        self.dtype: torch.dtype = getattr(torch, manifest["dtype"])
        self.hook: str = manifest["hook"]
        self._maps: dict[int, np.ndarray] = {}

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.folder)!r}: {self.hook}, {len(self):,} × "
            f"{self.d_in} {self.manifest['dtype']}, "
            f"{len(self.manifest['shards'])} shards)"
        )

    def gather(self, index: Index) -> Float32[Tensor, "rows d_in"]:
        """The rows at `index`, in that order. Raises IndexError out of 0 … n − 1."""
        index = np.ascontiguousarray(index, dtype=np.int64)
        _check_index(index, len(self))
        out = np.empty((len(index), self.d_in), STORED[self.manifest["dtype"]])
        if len(index):
            self._rows.gather(index, out)
        return self._as_float32(out)

    def _read(self, start: int, out: Float32[Tensor, "rows d_in"]) -> None:
        target, number = out.numpy(), int(np.searchsorted(self._starts, start, "right"))
        while len(target):
            first = start - self._starts[number - 1]
            part = self._shard(number - 1)[first : first + len(target)]
            if self.dtype == torch.bfloat16:  # the upper half of a float32
                bits = target[: len(part)].view(np.uint32)
                np.left_shift(part, 16, out=bits, dtype=np.uint32)
            else:
                target[: len(part)] = part
            target, start, number = target[len(part) :], start + len(part), number + 1

    def _as_float32(self, stored: np.ndarray) -> Float32[Tensor, "rows d_in"]:
        native = stored.astype(stored.dtype.newbyteorder("="), copy=False)
        return torch.from_numpy(native).view(self.dtype).float()

    def _shard(self, number: int) -> np.ndarray:
        if number not in self._maps:
            shard = self.manifest["shards"][number]
            file = shard["files"]["rows"]["file"]
            rows = self.folder.map(file)
            expected = (shard["rows"], self.d_in), STORED[self.manifest["dtype"]]
            if (rows.shape, rows.dtype.str) != expected:
                self._refuse([f"{file} holds {rows.shape} {rows.dtype.str}"])
            self._maps[number] = rows
        return self._maps[number]

    @cached_property
    def _rows(self) -> Any:
        from saeutils._gather import ShardedRows  # numba takes a second to import

        return ShardedRows([self._shard(i) for i in range(len(self._starts) - 1)])


class TensorStore(Store):
    """Rows in memory, read like a store. Rows may lie on any device."""

    def __init__(
        self,
        rows: Float[Tensor, "rows d_in"],
        provenance: "pd.DataFrame | None" = None,
        hook: str | None = None,
    ) -> None:
        if rows.ndim != 2 or not rows.numel():
            raise ValueError(f"rows of shape {tuple(rows.shape)}: expected (n, d_in)")
        if provenance is not None and len(provenance) != len(rows):
            raise ValueError(
                f"{len(provenance)} provenance records for {len(rows)} rows"
            )
        self.rows, self.hook = rows.detach(), hook
        self.d_in, self.dtype = rows.shape[1], rows.dtype
        self._provenance = provenance

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"TensorStore({len(self):,} × {self.d_in} {self.dtype})"

    @property
    def provenance(self) -> "pd.DataFrame":
        """One record a row; no columns when none were given."""
        if self._provenance is None:
            import pandas as pd

            return pd.DataFrame(index=pd.RangeIndex(len(self)))
        return self._provenance

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the rows and their provenance."""
        digest = hashlib.sha256(f"{self.d_in} {self.dtype}".encode())
        digest.update(as_stored(self.rows.cpu()).data)
        digest.update(self.provenance.to_csv(index=False).encode())
        return digest.hexdigest()

    def gather(self, index: Index) -> Float32[Tensor, "rows d_in"]:
        """The rows at `index`, in that order. Raises IndexError out of 0 … n − 1."""
        index = torch.as_tensor(index, dtype=torch.int64)
        _check_index(index.cpu().numpy(), len(self))
        return self.rows[index.to(self.rows.device)].float()

    def __getitem__(self, rows: slice) -> Float32[Tensor, "rows d_in"]:
        _check_step(rows)
        return self.rows[rows].float()  # stays on its device

    def _read(self, start: int, out: Float32[Tensor, "rows d_in"]) -> None:
        out.copy_(self.rows[start : start + len(out)])


def as_store(rows: Tensor | Store | str | Path) -> Store:
    """A tensor, a store, or the path of one: as a store.

    Raises ValueError for anything else: an iterator cannot be read again, or shuffled.
    """
    if isinstance(rows, Store):
        return rows
    if isinstance(rows, Tensor):
        return TensorStore(rows)
    if not isinstance(rows, str | Path):
        raise ValueError(
            f"rows are a {type(rows).__name__}: expected a store, its path, or a "
            "tensor (n, d_in); collect the batches of an iterator first, with torch.cat"
        )
    return ActivationStore.open(rows)


def _check_step(rows: slice) -> None:
    if rows.step not in (None, 1):
        raise ValueError(f"step {rows.step}: store[i:j] reads neighbours; use gather")


def _check_index(index: np.ndarray, n: int) -> None:
    if len(index) and not (index.min() >= 0 and index.max() < n):
        raise IndexError(
            f"rows {index.min()} … {index.max()} asked of a store of {n} rows"
        )


def _buffered(
    store: Store, order: BufferShuffle, tasks: range, batch_size: int, last: int
) -> Iterator[Batch]:
    """The batches at `tasks`, out of buffers that a thread fills one ahead."""
    pool, buffers = ThreadPoolExecutor(1), {}
    end = order.segments(last - 1, last)[0].buffer if last else 0
    # Two buffers take turns: taking memory afresh would cost more than filling it.
    size = min(len(store), order.block * order.blocks)
    memory = [torch.empty(size, store.d_in) for _ in range(2)]

    def fill(number: int) -> Tensor:
        out, at = memory[number % 2], 0
        for a, b in order.spans(number):
            store._read(a, out[at : at + b - a])
            at += b - a
        return out

    def rows(segment: Segment) -> Tensor:
        for number in [old for old in buffers if old < segment.buffer]:
            del buffers[number]
        for number in (segment.buffer, segment.buffer + 1):
            if number not in buffers and number <= end:
                buffers[number] = pool.submit(fill, number)
        return buffers[segment.buffer].result()[torch.from_numpy(segment.places)]

    try:
        for at in tasks:
            segments = order.segments(at, min(at + batch_size, last))
            index = np.concatenate([segment.rows for segment in segments])
            yield Batch(torch.cat([*map(rows, segments)]), torch.from_numpy(index))
    finally:
        for future in buffers.values():
            future.cancel()
        pool.shutdown(wait=False)


def _read_ahead(
    read: Callable[[int], Batch], tasks: Iterable[int], threads: int
) -> Iterator[Batch]:
    """map(read, tasks), in order, with threads working AHEAD of the consumer."""
    if threads == 0:
        yield from map(read, tasks)
        return
    pool, pending = ThreadPoolExecutor(threads), deque()
    try:
        for task in tasks:
            pending.append(pool.submit(read, task))
            if len(pending) > threads * AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also when the consumer stops early
        for future in pending:
            future.cancel()
        pool.shutdown(wait=False)
