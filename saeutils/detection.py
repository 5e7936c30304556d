"""Which unit tells a concept from the rest: chosen on one half, scored on the other.

Units are SAE latents, neurons, principal components or tokens, all by one protocol:
threshold and unit are chosen where F1 is largest on the rows of `choose`, and scored
on the rows of `score`. Nothing of size rows × units is ever dense, but for the few
units that were chosen.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saeutils.firing_scores import sparse_auc
from saeutils.streaming import Firings

if TYPE_CHECKING:
    import pandas as pd

LEVELS, PER_OCTAVE = 16, 3  # thresholds: 0, and the maximum · 2^(−j / 3), j = 1 … 15
BLOCK = 2**19  # entries worked on at once
SHUFFLED = "shuffled stories"  # the null's name
Member = Bool[np.ndarray, "rows concepts"]


@runtime_checkable
class Units(Protocol):
    """What fires on which row, in order of rows; `examples.Codes` is one."""

    d_sae: int
    n_rows: int

    def __iter__(self) -> Iterator[Firings]: ...


class Signed:
    """Units of both signs as twice as many: positive parts, then negative parts."""

    def __init__(self, units: Units) -> None:
        self.units, self.n_rows, self.d_sae = units, units.n_rows, 2 * units.d_sae

    def __iter__(self) -> Iterator[Firings]:
        half = self.d_sae // 2
        for row, unit, value in self.units:
            yield Firings(row, unit + half * (value < 0), value.abs())


class Categories:
    """A unit for each category (token, position): 1 on its rows, 0 elsewhere."""

    levels = 1  # no other threshold than 0

    def __init__(self, ids: Any, n: int) -> None:
        self.ids, self.n_rows, self.d_sae = np.asarray(ids, np.int64), len(ids), n

    def __iter__(self) -> Iterator[Firings]:
        ids = torch.from_numpy(self.ids.copy())
        yield Firings(torch.arange(len(ids)), ids, torch.ones(len(ids)))


class Detectors(NamedTuple):
    """For each concept the unit, and the threshold, that tell it best."""

    unit: Int[np.ndarray, " concepts"]
    threshold: Float[np.ndarray, " concepts"]
    """It says yes where the unit is above this (≥ 0)."""
    f1: Float[np.ndarray, " concepts"]
    """On the rows where both were chosen: too good, being the best of many."""


class Scores(NamedTuple):
    """Yes-or-no answers and activations against the truth; NaN where none is true."""

    precision: Float[np.ndarray, " n"]
    recall: Float[np.ndarray, " n"]
    f1: Float[np.ndarray, " n"]
    """2 TP / (said yes + is true)."""
    auc: Float[np.ndarray, " n"]
    """P(activation where true > activation where not), ties half."""


def best_units(units: Units, member: Member) -> Detectors:
    """The unit and threshold with the largest F1 for each concept; two passes.

    Thresholds tried: 0, and the unit's largest activation · 2^(−j / 3), j = 1 … 15.
    Of equal F1 the lower threshold, then the lower unit. Memory: concepts × units ×
    16 counts (units with an attribute `levels` = 1 are tried at 0 alone). A concept
    without rows has unit −1.

    Raises ValueError when members are given for another number of rows.
    """
    from scipy.sparse import csr_matrix

    _same_rows(units, len(member))
    largest = np.zeros(units.d_sae)
    for _, unit, value in _blocks(units):
        np.maximum.at(largest, unit, value)
    scale = np.where(largest > 0, largest, 1)
    levels = getattr(units, "levels", LEVELS)
    width, concepts = units.d_sae * levels, member.shape[1]
    hits = np.zeros((concepts, width), np.int32)
    fired = np.zeros(width, np.int64)
    for row, unit, value in _blocks(units):
        ratio = value / scale[unit]
        # Level j holds (2^(−(j+1)/3), 2^(−j/3)] of the maximum; the last one the rest.
        level = np.floor(-PER_OCTAVE * np.log2(ratio) + 1e-9).astype(np.int64)
        key = unit * levels + np.minimum(level, levels - 1)
        first = row[0]
        local = (np.ones(len(row), np.int32), (row - first, key))
        fires = csr_matrix(local, shape=(row[-1] - first + 1, width))
        inside = csr_matrix(member[first : row[-1] + 1].T.astype(np.int32))
        hits += (inside @ fires).toarray()
        fired += np.bincount(key, minlength=width)
    shape = (units.d_sae, levels)
    said = fired.reshape(shape).cumsum(1)
    true = member.sum(0)
    out = np.full(concepts, -1), np.zeros(concepts), np.full(concepts, np.nan)
    for c in np.flatnonzero(true):
        tp = hits[c].reshape(shape).cumsum(1)
        f1 = (2 * tp / (said + true[c]))[:, ::-1]  # lowest threshold first
        unit, back = np.unravel_index(f1.argmax(), shape)
        # The last level counts everything that fires at all.
        threshold = 0.0 if back == 0 else scale[unit] * _edge(levels - 1 - back)
        for array, value in zip(out, (unit, threshold, f1[unit, back]), strict=True):
            array[c] = value
    return Detectors(*out)


def _blocks(units: Units) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """What is positive, in order of rows, at most BLOCK entries at a time."""
    for row, unit, value in units:
        for part in zip(*(x.split(BLOCK) for x in (row, unit, value)), strict=True):
            positive = part[2] > 0
            if positive.any():
                yield tuple(x[positive].numpy() for x in part)


def _edge(level: Any) -> float:
    """What a value of this level, in maxima, exceeds."""
    return float(2.0 ** (-(level + 1) / PER_OCTAVE))


def score(units: Units, member: Member, found: Detectors) -> Scores:
    """How well each concept's unit tells it on these rows; one pass.

    Raises ValueError when members are given for another number of rows.
    """
    _same_rows(units, len(member))
    concepts = np.flatnonzero(found.unit >= 0)
    wanted = np.unique(found.unit[concepts])
    place = np.full(units.d_sae, -1)
    place[wanted] = np.arange(len(wanted))
    values = np.zeros((len(wanted), units.n_rows), np.float32)
    for row, unit, value in units:
        at = place[unit.numpy()]
        keep = at >= 0
        values[at[keep], row.numpy()[keep]] = value.numpy()[keep]
    out = np.full((4, member.shape[1]), np.nan)
    for c in concepts:
        own, true = values[place[found.unit[c]]], member[:, c]
        if true.any():
            said = own > found.threshold[c]
            out[:3, c] = agreement((said & true).sum(), said.sum(), true.sum())
            out[3, c] = auc(own, true)
    return Scores(*out)


def agreement(hits: Any, said: Any, true: Any) -> tuple[Any, Any, Any]:
    """Precision (0 where nothing is said), recall and F1 (NaN where none is true)."""
    hits, said, true = (np.asarray(v, dtype=float) for v in (hits, said, true))
    with np.errstate(invalid="ignore", divide="ignore"):
        precision = np.where(said > 0, hits / said, 0.0)
        known = np.where(true > 0, true, np.nan)
        return precision, hits / known, 2 * hits / (said + known)


def auc(values: Float[np.ndarray, " n"], true: Bool[np.ndarray, " n"]) -> float:
    """P(value where true > value where not), ties half; values ≥ 0."""
    if (values < 0).any():
        raise ValueError("activations must be ≥ 0: take `Signed` units")
    entry = (values > 0) | true
    n = np.array([true.sum()])
    zero = np.zeros(entry.sum(), np.int64)
    return float(sparse_auc(zero, values[entry], true[entry], n, len(values))[0])


def of_other_stories(
    member: Member,
    story: Int[np.ndarray, " rows"],
    position: Int[np.ndarray, " rows"],
    *,
    seed: int = 0,
) -> Member:
    """The null: each story gets the labels of another one, position by position.

    Stories are dealt by one cycle, so that none keeps its own labels; a story that is
    longer than the one it got begins that again. What holds of every story at the same
    place (openings, commas) survives; what is in the text does not. Rows of a story
    need not lie together, and the order of rows does not matter.

    Raises ValueError for fewer than two stories.
    """
    stories, which = np.unique(story, return_inverse=True)
    if len(stories) < 2:
        raise ValueError(f"{len(stories)} stories: the labels of another one need two")
    order = np.lexsort((position, which))
    start = np.searchsorted(which[order], np.arange(len(stories)))
    length = np.diff(np.append(start, len(order)))
    cycle = np.random.default_rng(seed).permutation(len(stories))
    donor = np.empty_like(cycle)
    donor[cycle] = np.roll(cycle, 1)
    rank = np.arange(len(order)) - start[which[order]]
    given = donor[which[order]]
    out = np.empty_like(member)
    out[order] = member[order[start[given] + rank % length[given]]]
    return out


def compare(
    units: Mapping[str, Sequence[Units]],
    choose: Member,
    score_on: Member,
    names: Sequence[str],
    *,
    places: Sequence[Any] = (),
    seed: int = 0,
) -> "pd.DataFrame":
    """The best unit of each kind for each concept: one row a (kind, concept).

    Args:
        units: kind -> units on the rows of `choose`, and on those of `score_on`.
        names: of the concepts.
        places: provenance (id, position) of both sets of rows. Adds the null
            "shuffled stories": units of the first kind, and `of_other_stories` with
            this seed.

    Returns: name (the kind), concept, rows (that carry it, of `score_on`), unit,
        threshold, precision, recall, f1, auc, and f1 where chosen.

    Raises ValueError when rows or concepts differ in number.
    """
    import pandas as pd

    if not choose.shape[1] == score_on.shape[1] == len(names):
        raise ValueError(
            f"{len(names)} names for {choose.shape[1]} and {score_on.shape[1]} concepts"
        )
    runs = [(name, pair, (choose, score_on)) for name, pair in units.items()]
    if len(places):
        dealt = [
            of_other_stories(member, *frame[["id", "position"]].to_numpy().T, seed=seed)
            for member, frame in zip((choose, score_on), places, strict=True)
        ]
        runs.append((SHUFFLED, next(iter(units.values())), tuple(dealt)))
    frames = []
    for name, (here, there), (chosen_on, scored_on) in runs:
        found = best_units(here, chosen_on)
        columns = {"concept": list(names), "rows": scored_on.sum(0), "unit": found.unit}
        columns |= {"threshold": found.threshold}
        columns |= {**score(there, scored_on, found)._asdict()}
        columns |= {"f1 where chosen": found.f1}
        frames.append(pd.DataFrame(columns).assign(name=name))
    return pd.concat(frames, ignore_index=True)


def _same_rows(units: Units, n: int) -> None:
    if units.n_rows != n:
        raise ValueError(
            f"{units.n_rows} rows of activations, {n} of labels: each row needs both"
        )
