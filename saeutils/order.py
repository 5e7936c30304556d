"""The order in which rows are visited: a pure function of (n, seed), nothing else.

Training reads an endless stream: one permutation of the n rows after another. Where
an epoch's permutation sends a position is computed, not looked up, so any part of
the stream costs the same (resuming replays nothing), no array of n numbers exists,
and the order is the same on every platform and for every number of workers.

The permutation is a Feistel network: a position is written as two digits (of bases
a and b ≈ √n, a·b ≥ n), and in turn a random function of one digit is added to the
other, modulo its base. Every such step can be undone, so the whole is a bijection,
whatever the functions are. They are tables of √n random numbers, made from (seed,
epoch). The rare result ≥ n goes through again until it falls below n.
Source: Luby and Rackoff 1988; Black and Rogaway 2002 (generalised Feistel).
"""

import math
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Int64

MAX_ROWS = 2**48
_HALF = np.uint64(32)


class Order(Protocol):
    """Rows at positions start … stop − 1 of the endless stream."""

    def __call__(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]: ...


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function: 64 bits in, 64 well-mixed bits out."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Permutation:
    """A random permutation of 0 … n − 1 keyed by integers; evaluated where asked."""

    def __init__(self, n: int, *key: int) -> None:
        if not 0 < n <= MAX_ROWS:
            raise ValueError(f"a permutation of {n} rows: expected 1 … 2**48")
        self.n = n
        high = math.isqrt(n - 1) + 1
        self._bases = bases = high, -(-n // high)
        # Small n mix slower: with these rounds all n! orders of n ≤ 6 are equally
        # frequent by a chi-square test.
        rounds = 6 + 56 // max(2, (n - 1).bit_length())
        mixed = np.zeros(1, np.uint64)
        for part in key:
            mixed = _mix(mixed ^ np.uint64(part % 2**64))
        self._tables = np.zeros((rounds, max(bases)), np.int64)
        for r in range(rounds):
            written, read = bases if r % 2 == 0 else bases[::-1]
            words = _mix(_mix(mixed + np.uint64(r)) ^ np.arange(read, dtype="u8"))
            self._tables[r, :read] = (words >> _HALF) * np.uint64(written) >> _HALF
        # Such networks favour even permutations; one swap, or none, evens that out.
        self._swap = n > 1 and bool(_mix(mixed - np.uint64(1))[0] & np.uint64(1))

    def __call__(self, positions: Int64[np.ndarray, " m"]) -> Int64[np.ndarray, " m"]:
        """Where the permutation sends each position (each in 0 … n − 1)."""
        from saeutils._gather import permute  # numba takes a second to import

        out = np.empty_like(positions)
        permute(positions, self._tables, *self._bases, self.n, self._swap, out)
        return out


class FullShuffle:
    """Each epoch an independent permutation of all n rows."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed = n, seed
        self._last: tuple[int, Permutation] = 0, Permutation(n, seed, 0)

    def __call__(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]:
        """Rows at positions start … stop − 1 of the endless stream."""
        parts = []
        while start < stop:
            epoch, first = divmod(start, self.n)
            last = min(self.n, first + stop - start)
            parts.append(self._of(epoch)(np.arange(first, last)))
            start += last - first
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def _of(self, epoch: int) -> Permutation:
        known, permutation = self._last  # one assignment: threads may share this
        if known != epoch:
            permutation = Permutation(self.n, self.seed, epoch)
            self._last = epoch, permutation
        return permutation


class Segment(NamedTuple):
    """A stretch of the stream whose rows lie in one buffer."""

    buffer: int
    """Number of the buffer, counted over all epochs."""
    places: Int64[np.ndarray, " m"]
    """Which rows of the buffer, in the order of the stream."""
    rows: Int64[np.ndarray, " m"]
    """The same rows by their number in the store."""


class BufferShuffle:
    """For slow disks: random blocks of neighbours, some at a time mixed in memory.

    An epoch permutes the blocks of `block` rows; each run of `blocks` blocks fills a
    buffer, whose rows are then permuted. Every row comes once an epoch, and reading
    is sequential within blocks. Two rows of one block fall into one buffer, hence
    near one another: `mixing` measures how much that leaves.
    """

    def __init__(self, n: int, seed: int, block: int, blocks: int) -> None:
        if block < 1 or blocks < 1:
            raise ValueError(
                f"{blocks} blocks of {block} rows: expected at least 1 of 1"
            )
        self.n, self.seed, self.block, self.blocks = n, seed, block, blocks
        self.n_blocks = -(-n // block)
        self.n_buffers = -(-self.n_blocks // blocks)
        self._epoch = lru_cache(2)(self._plan)
        self._buffer = lru_cache(4)(self._fill)

    def __call__(self, start: int, stop: int) -> Int64[np.ndarray, " rows"]:
        """Rows at positions start … stop − 1 of the endless stream."""
        parts = [segment.rows for segment in self.segments(start, stop)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def segments(self, start: int, stop: int) -> list[Segment]:
        """The same, stretch by stretch."""
        segments = []
        while start < stop:
            epoch, at = divmod(start, self.n)
            starts = self._epoch(epoch)[1]
            number = int(np.searchsorted(starts, at, side="right")) - 1
            first, size = int(starts[number]), int(starts[number + 1] - starts[number])
            end = min(size, at - first + stop - start)
            buffer = epoch * self.n_buffers + number
            inside, begins, ends = self._buffer(buffer, size)
            places = inside(np.arange(at - first, end))
            # Places count rows of the buffer: those of block b end before ends[b].
            block = np.searchsorted(ends, places, side="right")
            rows = begins[block] + places - (ends - np.diff(ends, prepend=0))[block]
            segments.append(Segment(buffer, places, rows))
            start += end - (at - first)
        return segments

    def _fill(
        self, buffer: int, size: int
    ) -> tuple[Permutation, np.ndarray, np.ndarray]:
        """Order of a buffer's rows; first row and end of each block in it."""
        epoch, number = divmod(buffer, self.n_buffers)
        begins, stops = np.array(self.spans(buffer)).T
        order = Permutation(size, self.seed, epoch, 1 + number)
        return order, begins, np.cumsum(stops - begins)

    def spans(self, buffer: int) -> list[tuple[int, int]]:
        """(start, stop) of each block of rows in a buffer, in the order they lie."""
        epoch, number = divmod(buffer, self.n_buffers)
        order = self._epoch(epoch)[0][number * self.blocks : (number + 1) * self.blocks]
        return [
            (b * self.block, min(self.n, (b + 1) * self.block)) for b in order.tolist()
        ]

    def _plan(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the blocks, and the position at which each buffer starts."""
        order = Permutation(self.n_blocks, self.seed, epoch)(np.arange(self.n_blocks))
        sizes = np.minimum(self.n - order * self.block, self.block)
        full = np.concatenate([[0], np.cumsum(sizes)])
        return order, np.append(full[: -1 : self.blocks], self.n)


class Mixing(NamedTuple):
    """How well an order mixes rows that were neighbours."""

    correlation: float
    """Of the numbers of successive rows: 1 in order, 0 ± 1/√n when shuffled."""
    documents: float
    """Distinct documents a batch, on average."""
    share: float
    """The same, divided by what independent draws would give: 1 is as good as full."""


def mixing(
    rows: Int64[np.ndarray, " n"], documents: Int64[np.ndarray, " n_rows"], batch: int
) -> Mixing:
    """Quality of the order `rows`; documents[i] is the document (image) of row i."""
    found = [
        len(set(documents[rows[i : i + batch]])) for i in range(0, len(rows), batch)
    ]
    share = np.bincount(np.unique(documents, return_inverse=True)[1]) / len(documents)
    expected = (1 - (1 - share) ** batch).sum()
    correlation = np.corrcoef(rows[:-1], rows[1:])[0, 1]
    mean = float(np.mean(found))
    return Mixing(float(correlation), mean, mean / float(expected))
