"""What a latent responds to: its strongest examples, and its classes.

Items are known by id, never by position: an item of many rows (patches, tokens) is
shown once, at its strongest row, and an item on which a latent is silent never is.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from saeutils.metrics import Autoencoder
from saeutils.sae import as_codes, encode_sparse
from saeutils.store import as_store
from saeutils.streaming import (
    BUDGET,
    Firings,
    Rows,
    checked_chunks,
    rows_within,
)


class Codes:
    """Sparse codes of rows, a chunk at a time; every pass over it encodes again.

    Args:
        sae: anything with `encode` and `W_dec`; None when the rows are codes already.
        rows: a store, a path to one, or a tensor (n, d_in).
        ids, labels: of each row; from the provenance of `rows` when not given. Without
            either an id is the number of the row.
        budget: bytes of the dense codes of one chunk.

    Attributes:
        d_sae, n_rows, ids (n_rows,), labels (n_rows,) or None.
    """

    def __init__(
        self,
        sae: Autoencoder | None,
        rows: Rows,
        *,
        ids: Int64[Tensor, " n"] | None = None,
        labels: Int64[Tensor, " n"] | None = None,
        budget: int = BUDGET,
    ):
        self.sae, self.store = sae, as_store(rows)
        d_in = self.store.d_in
        self.d_sae, self.d_in = (d_in, d_in) if sae is None else tuple(sae.W_dec.shape)
        self.n_rows = len(self.store)
        self.ids = self._column("id", ids)
        if self.ids is None:
            self.ids = torch.arange(self.n_rows)
        self.labels = self._column("label", labels)
        self._chunk = rows_within(budget, max(self.d_sae, self.d_in))

    def _column(self, name: str, given: Tensor | None) -> Tensor | None:
        provenance = getattr(self.store, "provenance", None)
        if given is None and provenance is not None and name in provenance:
            given = torch.as_tensor(provenance[name].to_numpy(copy=True))
        if given is not None and len(given) != self.n_rows:
            raise ValueError(
                f"{len(given)} {name}s for {self.n_rows} rows: each row needs one"
            )
        return given

    @torch.no_grad()
    def __iter__(self) -> Iterator[Firings]:
        """What fires in each chunk; `row` is the number of the row in the store."""
        first = 0
        device = "cpu" if self.sae is None else self.sae.W_dec.device
        for x in checked_chunks(self.store, self.d_in, self._chunk, device):
            codes = as_codes(x) if self.sae is None else encode_sparse(self.sae, x)
            yield Firings(codes.rows + first, codes.indices.long(), codes.values)
            first += len(x)


class StoredCodes(Codes):
    """The same of a `codes.CodeStore`: no pass encodes again.

    Args:
        chunk: rows that are in memory at once.
    """

    def __init__(
        self,
        store: Any,
        *,
        ids: Int64[Tensor, " n"] | None = None,
        labels: Int64[Tensor, " n"] | None = None,
        chunk: int = 2**15,
    ):
        self.sae, self.store, self._chunk = None, store, chunk
        self.d_sae = self.d_in = store.d_sae
        self.n_rows = len(store)
        self.ids, self.labels = self._column("id", ids), self._column("label", labels)
        if self.ids is None:
            self.ids = torch.arange(self.n_rows)

    def __iter__(self) -> Iterator[Firings]:
        for batch in self.store.chunks(self._chunk):
            first = int(batch.index[0])
            z = batch.codes
            yield Firings(z.rows + first, z.indices.long(), z.values)


class Examples(NamedTuple):
    """The strongest items of one latent, strongest first; all of them really fire."""

    latent: int
    values: Float32[Tensor, " m"]
    """Activation at the item's strongest row; m ≤ n when fewer items fire."""
    rows: Int64[Tensor, " m"]
    """That row's number in the store."""
    ids: Int64[Tensor, " m"]
    """Ids of the items, each once."""
    labels: Int64[Tensor, " m"] | None


class TopExamples:
    """Examples of many latents: `top[latent]`, and all of them by iteration."""

    def __init__(self, codes: Codes, n: int, latent: Any, value: Any, row: Any):
        self.n, self.d_sae = n, codes.d_sae
        self._ids, self._labels = codes.ids, codes.labels
        self._value, self._row = torch.from_numpy(value), torch.from_numpy(row)
        self._start = np.searchsorted(latent, np.arange(codes.d_sae + 1))

    def __getitem__(self, latent: int) -> Examples:
        if not 0 <= latent < self.d_sae:
            raise IndexError(f"latent {latent} is not in 0..{self.d_sae - 1}")
        part = slice(*self._start[latent : latent + 2])
        rows = self._row[part]
        labels = None if self._labels is None else self._labels[rows]
        return Examples(int(latent), self._value[part], rows, self._ids[rows], labels)

    def __len__(self) -> int:
        return self.d_sae

    def __iter__(self) -> Iterator[Examples]:
        return (self[latent] for latent in range(self.d_sae))


def top_examples(
    codes: Codes, n: int = 10, *, latents: Iterable[int] | None = None
) -> TopExamples:
    """The n items on which each latent fires most, in one pass over `codes`.

    Only positive activations count. Of an item with several rows the strongest
    counts; of equal activations the earlier row. Memory: n entries a latent.

    Args:
        latents: those to look at; None for all.

    Raises:
        ValueError: n below 1, or a latent that is not there.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    wanted = np.ones(codes.d_sae, bool)
    if latents is not None:
        chosen = np.asarray(list(latents), dtype=np.int64)
        if len(chosen) and not 0 <= chosen.min() <= chosen.max() < codes.d_sae:
            raise ValueError(f"latents must lie in 0..{codes.d_sae - 1}, got {chosen}")
        wanted[:] = False
        wanted[chosen] = True
    unique, item = np.unique(codes.ids.numpy(), return_inverse=True)
    several_rows = len(unique) < codes.n_rows
    # Of a latent that has n examples, what a newcomer must exceed.
    floor = np.where(wanted, 0.0, np.inf).astype(np.float32)
    best = Firings(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, "f4"))
    for chunk in codes:
        row, latent, value = (part.numpy() for part in chunk)
        new = value > floor[latent]
        row, latent, value = (
            np.concatenate([old, part[new]])
            for old, part in zip(best, (row, latent, value), strict=True)
        )
        order = np.lexsort((row, -value, latent))
        if several_rows:
            key = latent[order] * len(unique) + item[row[order]]
            _, strongest = np.unique(key, return_index=True)
            order = order[np.sort(strongest)]
        start = np.searchsorted(latent[order], latent[order])
        rank = np.arange(len(order)) - start
        kept = order[rank < n]
        best = Firings(row[kept], latent[kept], value[kept].astype("f4"))
        last = order[rank == n - 1]
        floor[latent[last]] = value[last]
    return TopExamples(codes, n, best.latent, best.value, best.row)


class AtQuantile(NamedTuple):
    """Items near one quantile of a latent's activations where it fires."""

    quantile: float
    values: Float32[Tensor, " m"]
    rows: Int64[Tensor, " m"]
    """Their numbers in the store."""


def at_quantiles(
    store: Any,
    latent: int,
    quantiles: Sequence[int | float] = (1, 0.9, 0.5, 0.1),
    n: int = 3,
) -> list[AtQuantile]:
    """The n rows next to each quantile of the activations, a story (image) once in all.

    What excites a latent most is often not what it mostly fires on. Rows are ranked by
    activation, equal ones by id and position, so that their order does not matter; of
    two as near to the quantile the weaker one comes first. Fewer than n where the
    stories run out. At quantile 1 the strongest comes first.

    Args:
        store: a `codes.CodeStore`.

    Raises ValueError for a quantile beyond [0, 1], n below 1, or a latent that never
    fires; IndexError for one that is not there.
    """
    if n < 1 or not all(0 <= q <= 1 for q in quantiles):
        raise ValueError(f"n {n} and quantiles {tuple(quantiles)}: n ≥ 1, 0 ≤ q ≤ 1")
    rows, values = (part.numpy() for part in store.column(latent))
    rows, values = rows[values > 0], values[values > 0]
    if not len(rows):
        raise ValueError(f"latent {latent} never fires here: it has no quantiles")
    records = store.provenance
    item = records["id"].to_numpy()[rows] if "id" in records else rows
    place = records["position"].to_numpy()[rows] if "position" in records else rows
    order = np.lexsort((place, item, values))
    found, used = [], set()
    for q in quantiles:
        distance = abs(np.arange(len(order)) - q * (len(order) - 1))
        near: list[int] = []
        for entry in order[np.argsort(distance, kind="stable")].tolist():
            if len(near) == n:
                break
            if item[entry] not in used:
                near.append(entry)
                used.add(item[entry])
        kept = torch.from_numpy(values[near]), torch.from_numpy(rows[near])
        found.append(AtQuantile(float(q), *kept))
    return found


@dataclass(frozen=True, eq=False)
class ClassProfile:
    """How each latent's activation spreads over the classes of the rows.

    Classes weigh the same however many rows they have. Latents that never fire have
    NaN for everything that is about their activation.
    """

    classes: Int64[Tensor, " c"]
    """The labels, rising."""
    mean: Float64[Tensor, "d_sae c"]
    """Mean |activation| over all rows of the class, silent ones included."""
    share: Float64[Tensor, "d_sae c"]
    """Share of the rows of the class on which the latent fires."""
    firing_counts: Int64[Tensor, " d_sae"]
    """Rows on which each latent fires."""

    @property
    def live(self) -> Bool[Tensor, " d_sae"]:
        """Which latents fire at all."""
        return self.firing_counts > 0

    @property
    def rate(self) -> Float64[Tensor, " d_sae"]:
        """Share of rows on which a latent fires, classes weighing the same."""
        return self.share.mean(1)

    @property
    def top_class(self) -> Int64[Tensor, " d_sae"]:
        """The class with the largest mean activation; −1 for dead latents."""
        return self.classes[self.mean.argmax(1)].where(self.live, torch.tensor(-1))

    @property
    def entropy(self) -> Float64[Tensor, " d_sae"]:
        """Class entropy in bits: −Σ_c p_c log2 p_c with p_c = mean_c / Σ mean.

        0 when all activation is on one class, log2(number of classes) when evenly
        spread. A latent that fired on few rows is low by chance: compare with the
        same latents under shuffled labels.
        """
        p = self.mean / self.mean.sum(1, keepdim=True)
        return torch.special.entr(p).sum(1) / np.log(2)

    @property
    def selectivity(self) -> Float64[Tensor, " d_sae"]:
        """(top − rest) / (top + rest), the mean activations on the top class and on
        the other classes together: 0 = the same on all, 1 = silent on the others.

        Source: Morcos et al. (2018), class selectivity index.
        """
        top = self.mean.amax(1)
        rest = (self.mean.sum(1) - top) / (len(self.classes) - 1)
        return (top - rest) / (top + rest)


def class_profile(
    codes: Codes, labels: Int64[Tensor, " n"] | None = None
) -> ClassProfile:
    """Mean activation and firing share of each latent by class, in one pass.

    Args:
        labels: of each row; those of `codes` when not given. Shuffled labels give the
            null for `entropy` and `selectivity`.

    Raises:
        ValueError: no labels, another number of them than rows, or a single class.
    """
    labels = codes.labels if labels is None else labels
    if labels is None:
        raise ValueError("the rows carry no labels: pass labels=, one a row")
    if len(labels) != codes.n_rows:
        raise ValueError(
            f"{len(labels)} labels for {codes.n_rows} rows: each row needs one"
        )
    classes, label, sizes = labels.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"a profile needs two classes or more, got {classes.tolist()}")
    shape = codes.d_sae, len(classes)
    mass = torch.zeros(shape, dtype=torch.float64)
    count = torch.zeros(shape, dtype=torch.float64)
    for row, latent, value in codes:
        key = latent * len(classes) + label[row]
        mass.view(-1).index_add_(0, key, value.double().abs())
        count.view(-1).index_add_(0, key, torch.ones(len(key), dtype=torch.float64))
    return ClassProfile(classes, mass / sizes, count / sizes, count.sum(1).long())
