"""What happens to one SAE when latents of another are put into it.

The reconstruction of SAE A with latents J of SAE B inserted and its own I removed is

    x̂ = (1 − t) b_A + t b_B + Σ_{i ∉ I} z_i^A d_i^A + Σ_{j ∈ J} z_j^B d_j^B

with t the share of the steps done: A at t = 0, B at t = 1. A latent fires as it would
in its own SAE, which is well defined for SAEs with a threshold a latent (ReLU,
JumpReLU, and BatchTopK as it is exported), and an approximation for TopK. Nothing is
retrained.

A latent of B whose insertion lowers the error brings something that A lacks ("novel");
one that raises it brings again what A has ("reconstruction"), until its counterparts in
A are taken out. Source: Leask et al., "Sparse autoencoders do not find canonical units
of analysis" (2025). What we add: L0 along the way, since more latents fire while both
are in, and the same with another seed of A's own width in place of B.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from saeutils.splitting import Coded, Kin, Parents, parents_by_cosine, shuffled
from saeutils.streaming import BUDGET, Rows, RunningMoments, checked_chunks, rows_within

if TYPE_CHECKING:
    import pandas as pd

ORDERS = ("novel first", "swaps first", "random")


@torch.no_grad()
def insertion(
    base: Coded,
    donor: Coded,
    rows: Rows,
    *,
    W_dec: Float[Tensor, "d_donor d_in"] | None = None,
    budget: int = BUDGET,
) -> Float64[Tensor, " d_donor"]:
    """Change of the FVU of `base` when each latent of `donor` is inserted alone.

        ΔFVU_j = Σ_rows (z_j² ‖d_j‖² − 2 z_j r · d_j) / Σ ‖x − mean‖²,  r = x − x̂_base

    All latents at once, over the entries of the codes only. Below 0: novel.

    Args:
        rows: those that both were coded on.
        W_dec: other directions for the donor's latents, as a null.

    Raises ValueError for rows of another number or width.
    """
    W = donor.W_dec if W_dec is None else W_dec
    norms = W.double().square().sum(1)
    total, change = RunningMoments(W.shape[1]), torch.zeros(len(W), dtype=torch.float64)
    for x, part in _chunks(base, donor, rows, budget):
        total.update(x)
        residual = x - base.decode(part)
        z = donor.z[part].tocoo()
        row, latent = (torch.from_numpy(c).long() for c in z.coords)
        value = torch.from_numpy(z.data).double()
        size = rows_within(budget, 2 * W.shape[1])
        dot = [
            (residual[r] * W[j]).sum(1)
            for r, j in zip(row.split(size), latent.split(size), strict=True)
        ]
        delta = value.square() * norms[latent] - 2 * value * torch.cat(dot).double()
        change.index_add_(0, latent, delta)
    return change / total.scatter.sum()


class PutIn(NamedTuple):
    """What single latents do in another SAE; only those that fire often enough."""

    cosine: Float[Tensor, " live"]
    """With the nearest latent of the SAE that they are put into."""
    rate: Float64[Tensor, " live"]
    """Share of the rows on which they fire."""
    change: Float64[Tensor, " live"]
    """Of its FVU, each put in alone."""


def put_in(
    base: Coded,
    donor: Coded,
    relation: Kin,
    rows: Rows,
    *,
    shuffle_seed: int | None = None,
) -> PutIn:
    """`insertion` beside the cosine of the donor's live latents.

    shuffle_seed: deal the donor's directions to its latents at random, as a null: the
        same firing, the same directions, but not together.
    """
    if shuffle_seed is None:
        change = insertion(base, donor, rows)[relation.live]
        return PutIn(relation.nearest, relation.rate, change)
    generator = torch.Generator().manual_seed(shuffle_seed)
    W = donor.W_dec[torch.randperm(len(donor.W_dec), generator=generator)]
    cosine = parents_by_cosine(base.W_dec, W).score
    change = insertion(base, donor, rows, W_dec=W)
    return PutIn(cosine[relation.live], relation.rate, change[relation.live])


class Step(NamedTuple):
    """What goes in and out together."""

    kind: str
    """novel: nothing goes out; lost: nothing comes in; swap: both."""
    out: Int64[np.ndarray, " m"]
    """Latents of A that are removed."""
    into: Int64[np.ndarray, " n"]
    """Latents of B that are inserted."""


def groups(
    W_a: Float[Tensor, "a d_in"],
    W_b: Float[Tensor, "b d_in"],
    *,
    above: float = 0.7,
    budget: int = BUDGET,
) -> list[Step]:
    """Which latents of A and B are exchanged together.

    Latents whose cosine exceeds `above` are joined; what hangs together is one swap.
    A latent of B that nothing of A is joined to is novel; one of A without any in B is
    lost. Novel ones come first, the least similar to A before the others, then swaps,
    the most similar first, then the lost.
    """
    a, b = normalize(W_a, dim=1), normalize(W_b, dim=1)
    edges, nearest = [], []
    for start, block in zip(
        range(0, len(b), size := rows_within(budget, len(a))),
        b.split(size),
        strict=True,
    ):
        cosine = block @ a.T
        nearest.append(cosine.amax(1))
        j, i = (cosine > above).nonzero(as_tuple=True)
        edges.append(torch.stack([i, j + start + len(a)]))
    i, j = torch.cat(edges, 1).numpy()
    n = len(a) + len(b)
    graph = sparse.coo_array((np.ones(len(i), bool), (i, j)), shape=(n, n))
    _, component = sparse.csgraph.connected_components(graph, directed=False)
    order = np.argsort(component, kind="stable")
    bounds = np.flatnonzero(np.diff(component[order])) + 1
    similar = torch.cat(nearest).numpy()
    steps = []
    for members in np.split(order, bounds):
        out, into = members[members < len(a)], members[members >= len(a)] - len(a)
        kind = "lost" if not len(into) else "swap" if len(out) else "novel"
        steps.append(Step(kind, out, into))

    def place(step: Step) -> tuple[int, float]:
        if step.kind == "lost":
            return 2, 0.0
        cosine = float(similar[step.into].max())
        return (0, cosine) if step.kind == "novel" else (1, -cosine)

    return sorted(steps, key=place)


def families(parents: Parents, m: int) -> list[Step]:
    """Each of the m latents of A against its children in B (see `splitting`), in order.

    Keeps L0 about the same all the way, so that ways of naming parents can be compared
    by the FVU between: the better the families, the less is lost half-way.

    Raises ValueError for a parent that is not in −1 … m − 1.
    """
    parent = parents.parent.numpy()
    if len(parent) and not -1 <= parent.min() <= parent.max() < m:
        raise ValueError(
            f"parents {parent.min()} … {parent.max()}: expected −1 … {m - 1}"
        )
    order = np.argsort(parent, kind="stable")
    none, *kids = np.split(order, np.searchsorted(parent[order], np.arange(m)))
    steps = [
        Step("swap" if len(mine) else "lost", np.array([i]), mine)
        for i, mine in enumerate(kids)
    ]
    return steps + [Step("novel", np.array([], np.int64), np.array([j])) for j in none]


def ways(
    small: Coded, large: Coded, relation: Kin, *, above: float = 0.7, seed: int = 0
):
    """Ways from one SAE to another, name -> steps, for `path`.

    Families by cosine, by firing, and dealt at random (the null), in random order; and
    the published one: novel latents first, then swaps, then the lost.
    """
    m = len(small.W_dec)
    parents = {
        "families by cosine": relation.by_cosine,
        "families by firing": relation.by_firing,
        "families dealt at random": shuffled(relation.by_cosine, seed=seed),
    }
    found = {
        name: ordered(families(p, m), "random", seed=seed)
        for name, p in parents.items()
    }
    return found | {"novel first": groups(small.W_dec, large.W_dec, above=above)}


def ordered(steps: Sequence[Step], order: str, *, seed: int = 0) -> list[Step]:
    """The steps of `groups` as they are ("novel first"), with novel ones after the
    swaps ("swaps first"), or in any order ("random"). Raises ValueError for another."""
    if order not in ORDERS:
        raise ValueError(f"order {order!r} is none of {', '.join(ORDERS)}")
    if order == "random":
        places = np.random.default_rng(seed).permutation(len(steps))
        return [steps[i] for i in places]
    late = "novel" if order == "swaps first" else ""
    return sorted(steps, key=lambda step: step.kind == late)


@torch.no_grad()
def path(
    a: Coded,
    b: Coded,
    rows: Rows,
    steps: Sequence[Step],
    *,
    points: int = 24,
    budget: int = BUDGET,
) -> "pd.DataFrame":
    """FVU and L0 on the way from SAE A to SAE B, as the steps say.

    Returns `points` + 1 rows or fewer: done (share of latents exchanged), kind (of the
    last step), inserted, removed, fvu, l0. The first is A, the last B, exactly.

    Raises ValueError when the steps are not an exchange of all of A for all of B.
    """
    import pandas as pd

    for name, coded, column in (("A", a, "out"), ("B", b, "into")):
        moved = np.concatenate([getattr(step, column) for step in steps])
        if not np.array_equal(np.sort(moved), np.arange(len(coded.W_dec))):
            raise ValueError(f"the steps do not move each latent of {name} once")
    moved = np.cumsum([len(s.out) + len(s.into) for s in steps])
    done = moved / moved[-1]
    # A point after the first step that reaches each share; the last is B.
    ends = np.unique(np.searchsorted(done, np.linspace(0, 1, points + 1)[1:] - 1e-9))
    W = torch.cat([-a.W_dec, b.W_dec]).numpy()
    columns = [
        np.concatenate([x for s in steps[i:j] for x in (s.out, s.into + len(a.W_dec))])
        for i, j in zip([0, *(ends + 1)], ends + 1, strict=False)
    ]
    shift = np.diff(done[ends], prepend=0).astype(np.float32)
    bias = (b.b_dec - a.b_dec).numpy()
    total = RunningMoments(W.shape[1])
    error = np.zeros(len(ends) + 1)
    for x, part in _chunks(a, b, rows, budget):
        total.update(x)
        z = sparse.hstack([a.z[part], b.z[part]], format="csc")
        residual = (a.decode(part) - x).numpy()
        error[0] += np.square(residual, dtype=np.float64).sum()
        for k, chosen in enumerate(columns):
            residual += z[:, chosen] @ W[chosen] + shift[k] * bias
            error[k + 1] += np.square(residual, dtype=np.float64).sum()
    sign = np.concatenate([-a.counts.numpy(), b.counts.numpy()])
    l0 = a.l0 + np.cumsum([0, *(sign[c].sum() for c in columns)]) / a.z.shape[0]
    inserted, removed = (
        np.cumsum([len(getattr(s, name)) for s in steps])[ends]
        for name in ("into", "out")
    )
    table = {
        "done": [0, *done[ends]],
        "kind": ["start", *(steps[e].kind for e in ends)],
        "inserted": [0, *inserted],
        "removed": [0, *removed],
        "fvu": error / total.scatter.sum().item(),
        "l0": l0,
    }
    return pd.DataFrame(table)


def _chunks(a: Coded, b: Coded, rows: Rows, budget: int):
    """(rows, their slice), refusing rows that were not coded."""
    if a.z.shape[0] != b.z.shape[0] or a.W_dec.shape[1] != b.W_dec.shape[1]:
        raise ValueError(
            f"codes of {a.z.shape[0]} and {b.z.shape[0]} rows, decoders of width "
            f"{a.W_dec.shape[1]} and {b.W_dec.shape[1]}: both must be on the same rows"
        )
    start = 0
    for x in checked_chunks(rows, a.W_dec.shape[1], rows_within(budget, len(a.b_dec))):
        yield x.float(), slice(start, start + len(x))
        start += len(x)
    if start != a.z.shape[0]:
        raise ValueError(f"{start} rows, but codes of {a.z.shape[0]}")
