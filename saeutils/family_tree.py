"""A latent, its children in the next SAE, and theirs, with the words they stand for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from saeutils.splitting import Coded, Parents, firing_scores


@dataclass(frozen=True)
class Node:
    """A latent in a tree of latents."""

    sae: str
    latent: int
    above: int
    """Place of its parent in the list; −1 for the root."""
    share: float
    """Of the rows on which its parent fires, those on which it does (1 of the root)."""
    cosine: float
    """Of its decoder row with its parent's (1 of the root)."""
    words: tuple[str, ...]
    """The tokens on which it fires more often than its parent's firings (for the root:
    than the text) would have it; the largest excess, in rows, first."""
    concept: str
    """That with the best F1."""
    precision: float
    recall: float


def tree(
    saes: Mapping[str, Coded],
    parents: Sequence[Parents],
    root: int,
    tokens: Sequence[str] | np.ndarray,
    labels: Bool[np.ndarray, "rows concepts"],
    concepts: Sequence[str],
    *,
    most: Sequence[int],
    least: int | float = 0.02,
    words: int = 4,
) -> list[Node]:
    """A latent of the first SAE, its children in the second, theirs in the third, …

    Args:
        saes: name -> codes, all on the same rows; the narrowest first.
        parents: of the second SAE in the first, of the third in the second, …
        root: latent of the first SAE.
        tokens: the text of each row.
        most: children shown of one latent, at each step; those with the largest share.
        least: share of the parent's rows that a child must cover.

    Returns the nodes, each after its parent, siblings by falling share.

    Raises ValueError unless there are parents, and a number of children, for each step.
    """
    if not len(saes) - 1 == len(parents) == len(most):
        raise ValueError(
            f"{len(saes)} SAEs, parents for {len(parents)} steps and most for "
            f"{len(most)}: expected one of each for every step between SAEs"
        )
    coded, names = list(saes.values()), list(saes)
    kinds, kind = np.unique(np.asarray(tokens), return_inverse=True)
    scores = [firing_scores(c, labels) for c in coded]
    everywhere = np.bincount(kind, minlength=len(kinds)) / len(kind)
    found: list[Node] = []

    def grow(
        level: int,
        latent: int,
        above: int,
        share: float,
        cosine: float,
        usual: Float[np.ndarray, " kinds"],
    ) -> None:
        rows = coded[level].by_latent[:, [latent]].indices
        counts = np.bincount(kind[rows], minlength=len(kinds))
        typical = _typical(counts, usual)[:words]
        f1, score = scores[level].f1[:, latent], scores[level]
        best, place = int(f1.argmax()), len(found)
        told = [float(s[best, latent]) for s in (score.precision, score.recall)]
        text = tuple(str(kinds[w]) for w in typical)
        here = share, cosine, text, concepts[best], *told
        found.append(Node(names[level], latent, above, *here))
        if level + 1 == len(coded):
            return
        together = coded[level + 1].fires[rows].sum(0) / max(len(rows), 1)
        together[parents[level].parent.numpy() != latent] = 0
        for child in np.argsort(-together, kind="stable")[: most[level]].tolist():
            if together[child] < least:
                break
            pair = coded[level].W_dec[latent], coded[level + 1].W_dec[child]
            cosine = torch.cosine_similarity(*pair, dim=0).item()
            size = float(together[child]), cosine, counts / max(len(rows), 1)
            grow(level + 1, child, place, *size)

    grow(0, root, -1, 1.0, 1.0, everywhere)
    return found


def _typical(
    counts: Int[np.ndarray, " kinds"], usual: Float[np.ndarray, " kinds"]
) -> Int[np.ndarray, " some"]:
    """Kinds that occur, by falling excess; then, where none does, by count."""
    excess = counts - counts.sum() * usual
    order = np.lexsort((-counts, -excess))
    return order[counts[order] > 0]
