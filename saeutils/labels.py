"""Automatic labels of latents, and how well they tell where a latent fires.

A label says on which rows a latent should fire: on some tokens, after some tokens, or
on a concept. It is chosen for its F1 on some stories and judged on others: `count` →
`automatic_labels` → `judge`, with `deal` for the null. `by_kind` does all of it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from saeutils.context import token_texts
from saeutils.detection import Scores, Units, agreement
from saeutils.facts import Facts
from saeutils.firing_scores import sparse_auc

if TYPE_CHECKING:
    import pandas as pd

CONCEPT = "concept"  # the kind of a label that is one concept
BEST = "best of all"  # whatever kind is best for a latent


class Counts(NamedTuple):
    """How often latents fire on what; the order of rows does not matter.

    Concepts are left out where none are known.
    """

    fires: Int[np.ndarray, " d_sae"]
    """Rows on which each latent fires."""
    rows: dict[str, Int[np.ndarray, " categories"]]
    """Kind -> rows of each category: of each concept, of each token."""
    hits: dict[str, Any]
    """Kind -> CSC (categories, d_sae): rows of the category on which it fires."""


class Label(NamedTuple):
    """Where a latent is said to fire."""

    latent: int
    kind: str
    """"concept", or the name of a property, as "on" or "after"."""
    values: tuple[int, ...]
    """The concept, or the categories (tokens), most telling first."""
    f1: float
    """On the rows where it was chosen."""

    def text(self, concepts: Sequence[str], tokenizer: Any) -> str:
        """In words; categories are tokens of the tokenizer."""
        if self.kind == CONCEPT:
            return f"{CONCEPT} {concepts[self.values[0]]}"
        words = token_texts(tokenizer, self.values)
        words = [f"“{word}”".replace("\n", "⏎") for word in words]
        return f"{self.kind} {', '.join(words)}"


class Judged(NamedTuple):
    """Labels, and how they do on rows where they were not chosen."""

    labels: list[Label]
    scores: Scores
    dealt: Scores
    """The null: each label judged by the firings of another latent."""

    def row(self) -> dict[str, int | float]:
        """Means over labels, for a table."""
        return {
            "latents": len(self.labels),
            "F1 where chosen": float(np.mean([x.f1 for x in self.labels])),
            "F1": mean_of(self.scores.f1),
            "F1 dealt": mean_of(self.dealt.f1),
            "AUC": mean_of(self.scores.auc),
            "AUC dealt": mean_of(self.dealt.auc),
        }


def by_kind(
    choose: Units,
    score: Units,
    known: tuple[Facts, Facts],
    *,
    seed: int = 0,
    **how: Any,
) -> dict[str, Judged]:
    """Labels of each kind, and the best of all kinds, chosen and judged.

    Args:
        choose, score: what fires on the rows to choose and to judge on.
        known: facts of the two.
        how: `least` and `most` of `automatic_labels`.
    """
    counts, judged = count(choose, known[0]), {}
    for kind in (*counts.hits, BEST):
        kinds = () if kind == BEST else (kind,)
        made = automatic_labels(counts, kinds=kinds, **how)
        dealt = judge(score, known[1], made, deal(made, seed=seed))
        judged[kind] = Judged(made, judge(score, known[1], made), dealt)
    return judged


def across(
    sources: Mapping[str, tuple[Units, Units, Facts, Facts]], **how: Any
) -> tuple[dict[str, dict[str, Judged]], "pd.DataFrame"]:
    """Labels chosen on each source of text, judged on other stories of all sources.

    Args:
        sources: name -> units on its rows to choose and to judge on, facts of both.
        how: as for `by_kind`.

    Returns: name -> `by_kind` of it; and a row a (chosen on, kind): `Judged.row`, and
        the mean F1 on every other source ("F1 on NAME"), NaN where labels cover no row.
    """
    import pandas as pd

    judged, rows = {}, []
    for name, (choose, score, *known) in sources.items():
        judged[name] = by_kind(choose, score, tuple(known), **how)
        for kind, found in judged[name].items():
            row = {"chosen on": name, "kind": kind} | found.row()
            for other, (_, units, _, there) in sources.items():
                if other != name:
                    f1 = judge(units, there, found.labels).f1
                    row[f"F1 on {other}"] = mean_of(f1)
            rows.append(row)
    return judged, pd.DataFrame(rows).set_index(["chosen on", "kind"])


def mean_of(scores: Float[np.ndarray, " n"]) -> float:
    """Of those that there are; NaN without any."""
    known = scores[np.isfinite(scores)]
    return float(known.mean()) if len(known) else float("nan")


def count(units: Units, known: Facts) -> Counts:
    """One pass over what fires. Raises ValueError when rows differ in number."""
    from scipy.sparse import csc_matrix, csr_matrix

    _checked(units, known)
    _, member, properties = known
    d, fires = units.d_sae, np.zeros(units.d_sae, np.int64)
    sizes = {kind: int(ids.max()) + 1 for kind, ids in properties.items()}
    rows = {k: _sizes(ids, sizes[k]) for k, ids in properties.items()}
    hits = {kind: csr_matrix((n, d), dtype=np.int64) for kind, n in sizes.items()}
    concepts = np.zeros((member.shape[1], d), np.int64)
    for row, latent, value in units:
        row, latent = row[value > 0].numpy(), latent[value > 0].numpy()
        if not len(row):
            continue
        one = np.ones(len(row), np.int64)
        fires += np.bincount(latent, minlength=d)
        for kind, ids in properties.items():
            known = ids[row] >= 0
            at = ids[row[known]], latent[known]
            hits[kind] += csr_matrix((one[known], at), shape=(sizes[kind], d))
        first, last = row[0], row[-1] + 1
        here = csr_matrix((one, (row - first, latent)), shape=(last - first, d))
        concepts += (csr_matrix(member[first:last].T.astype(np.int64)) @ here).toarray()
    if member.shape[1]:
        rows, hits = {CONCEPT: member.sum(0), **rows}, {CONCEPT: concepts, **hits}
    return Counts(fires, rows, {kind: csc_matrix(h) for kind, h in hits.items()})


def automatic_labels(
    counts: Counts,
    *,
    kinds: Sequence[str] = (),
    least: int = 20,
    most: int = 8,
) -> list[Label]:
    """The label with the largest F1 for each latent that fires on `least` rows.

    A concept label is one concept. A label of another kind names categories: of the
    `most` on which the latent fires most often, those that, taken in order of the
    share of their rows on which it fires, give the largest F1.

    Args:
        kinds: those allowed; default: all that were counted.

    Raises ValueError for a kind that was not counted, least or most below 1.
    """
    kinds = list(kinds or counts.hits)
    if unknown := set(kinds) - counts.hits.keys():
        raise ValueError(f"kinds {sorted(unknown)} are none of {list(counts.hits)}")
    if least < 1 or most < 1:
        raise ValueError(f"least {least} and most {most} must be at least 1")
    labels = []
    for latent in np.flatnonzero(counts.fires >= least).tolist():
        best = [_best(counts, kind, latent, most) for kind in kinds]
        labels.append(max(best, key=lambda label: label.f1))
    return labels


def _best(counts: Counts, kind: str, latent: int, most: int) -> Label:
    hits, fires = counts.hits[kind], counts.fires[latent]
    part = slice(*hits.indptr[latent : latent + 2])
    category, n = hits.indices[part], hits.data[part]
    if not len(category):  # it fires on no concept
        return Label(latent, kind, (0,), 0.0)
    size = counts.rows[kind][category]
    if kind == CONCEPT:
        f1 = 2 * n / (fires + size)
        i = np.lexsort((category, -f1))[0]
        return Label(latent, kind, (int(category[i]),), float(f1[i]))
    often = np.lexsort((category, -n))[:most]
    order = often[np.lexsort((category[often], -n[often], -n[often] / size[often]))]
    f1 = 2 * n[order].cumsum() / (fires + size[order].cumsum())
    taken = order[: int(f1.argmax()) + 1]
    return Label(latent, kind, tuple(category[taken].tolist()), float(f1.max()))


def judge(
    units: Units,
    known: Facts,
    labels: Sequence[Label],
    latents: Sequence[int] | Int[np.ndarray, " labels"] | None = None,
) -> Scores:
    """Does the latent fire where its label says? Of each label, in one pass.

    Precision is the share of its firings that the label covers, recall the share of
    the label's rows on which it fires; AUC compares activations on the label's rows
    with those elsewhere. NaN for a label that covers no row.

    Args:
        latents: judged instead of those that the labels were made for (see `deal`);
            each at most once.

    Raises ValueError when rows differ in number, or a latent comes twice.
    """
    from scipy.sparse import csr_matrix

    _checked(units, known)
    _, member, properties = known
    latents = np.array([x.latent for x in labels] if latents is None else latents)
    if len(latents) != len(labels) or len(np.unique(latents)) != len(latents):
        raise ValueError(f"{len(labels)} labels need as many latents, each once")
    place = np.full(units.d_sae, -1)
    place[latents] = np.arange(len(labels))
    ids = {**properties, CONCEPT: None}
    sizes = {
        k: member.shape[1] if v is None else int(v.max()) + 1 for k, v in ids.items()
    }
    true, covers = np.zeros(len(labels), np.int64), {}
    for kind, size in sizes.items():
        pairs = [
            (i, v)
            for i, x in enumerate(labels)
            if x.kind == kind
            for v in x.values
            if v < size  # a token that does not occur here covers no row
        ]
        i, v = np.array(pairs, np.int64).reshape(-1, 2).T
        covers[kind] = csr_matrix(
            (np.ones(len(i), bool), (i, v)), shape=(len(labels), size)
        )
        n = member.sum(0) if kind == CONCEPT else _sizes(ids[kind], size)
        true += covers[kind].astype(np.int64) @ n
    kind_of = np.array([list(sizes).index(x.kind) for x in labels])
    concept = np.array([x.values[0] if x.kind == CONCEPT else 0 for x in labels])
    kept: list[tuple[np.ndarray, ...]] = [(np.zeros(0, int), np.zeros(0), true[:0] > 0)]
    for row, latent, value in units:
        i = place[latent.numpy()]
        keep = (i >= 0) & (value.numpy() > 0)
        i, row, value = i[keep], row.numpy()[keep], value.numpy()[keep]
        yes = np.zeros(len(i), bool)
        for number, kind in enumerate(sizes):
            own = kind_of[i] == number
            if kind == CONCEPT:
                own &= concept[i] < member.shape[1]
                yes[own] = member[row[own], concept[i[own]]]
            else:
                own &= ids[kind][row] >= 0
                if own.any():
                    found = covers[kind][i[own], ids[kind][row[own]]]
                    yes[own] = np.asarray(found).ravel()
        kept.append((i, value, yes))
    i, value, yes = (np.concatenate(part) for part in zip(*kept, strict=True))
    said = np.bincount(i, minlength=len(labels))
    hits = np.bincount(i, yes, len(labels))
    above = sparse_auc(i, value, yes, true, units.n_rows)
    silent, rest = true - hits, units.n_rows - true - (said - hits)
    with np.errstate(invalid="ignore", divide="ignore"):
        ties = silent * rest / 2 / (true * (units.n_rows - true))
    return Scores(*agreement(hits, said, true), above + ties)


def covers(label: Label, known: Facts) -> Bool[np.ndarray, " rows"]:
    """The rows on which the label says that its latent fires."""
    if label.kind == CONCEPT:
        return known.member[:, label.values[0]]
    return np.isin(known.properties[label.kind], label.values)


def coverage(
    codes: Any, known: Facts, label: Label, parts: int = 4
) -> Float[np.ndarray, " parts"]:
    """Share of a latent's firings that its label covers, by strength.

    The firings are sorted by activation, strongest first (equal ones by row), and cut
    into as many equal parts. NaN where a part is empty.

    Args:
        codes: a `codes.CodeStore` of the rows that are known.

    Raises ValueError when rows differ in number.
    """
    inside = covers(label, known)
    if len(inside) != len(codes):
        raise ValueError(f"{len(codes)} rows of activations, facts of {len(inside)}")
    rows, values = (part.numpy() for part in codes.column(label.latent))
    order = rows[np.argsort(-values, kind="stable")]
    return np.array([mean_of(x * 1.0) for x in np.array_split(inside[order], parts)])


def deal(labels: Sequence[Label], *, seed: int = 0) -> Int[np.ndarray, " labels"]:
    """The null: each label goes to the latent of another, by one random cycle."""
    latents = np.array([x.latent for x in labels])
    cycle = np.random.default_rng(seed).permutation(len(latents))
    dealt = np.empty_like(latents)
    dealt[cycle] = latents[np.roll(cycle, 1)]
    return dealt


def _sizes(ids: Int[np.ndarray, " rows"], n: int) -> Int[np.ndarray, " n"]:
    return np.bincount(ids[ids >= 0], minlength=n)


def _checked(units: Units, known: Facts) -> None:
    numbers = {"concepts": len(known.member)}
    numbers |= {kind: len(ids) for kind, ids in known.properties.items()}
    for name, n in numbers.items():
        if n != units.n_rows:
            raise ValueError(f"{units.n_rows} rows of activations, {n} of {name!r}")
    if reserved := {CONCEPT, BEST} & known.properties.keys():
        raise ValueError(f"a property cannot be called {min(reserved)!r}")
