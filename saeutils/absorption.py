"""Taking absorbed atoms apart, by a rule that never looks at a ground truth.

Where feature c fires only together with its parent p, one atom along p + c explains
as much as two along p and c, with fewer codes: sparsity itself asks for the merger
("absorption"). What gives it away is that p and c have magnitudes of their own. On
nearly every row where the merged atom fires, the best SIGNED amount of the parent's
atom to add is not zero, on either side. An atom that merely lies close to another has
some of that to add only where the other feature happens to fire as well.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saeutils.sparse_coding import SparseCodes


def chance_cosine(m: int, d: int) -> float:
    """The cosine that one pair among m random directions in d dimensions exceeds, on
    average: solves m (m − 1) / 2 · P(cos > c) = 1.

    (1 + cos) / 2 of random directions is Beta((d − 1)/2, (d − 1)/2).
    """
    from scipy.stats import beta

    tail = min(0.5, 2 / max(m * (m - 1), 1))
    return float(2 * beta.isf(tail, (d - 1) / 2, (d - 1) / 2) - 1)


@torch.no_grad()
def take_apart(
    W: Float[Tensor, "m d"],
    codes: SparseCodes,
    left: Float[Tensor, "rows d"],
    *,
    least: int | float,
    above: float | None = None,
    share: float = 0.5,
    fewest: int = 20,
) -> tuple[Float[Tensor, "m d"], int]:
    """Projects the more frequent atom i out of the rarer j where j has absorbed i.

    That is, where cos(i, j) exceeds `above` and, on more than `share` of the rows on
    which j fires, |α| > `least` for (α, β) = argmin ‖r − α W_i − β W_j‖², r being the
    row without the other atoms' parts. Each j loses one i a call, the nearest.

    Args:
        left: rows − b − codes · W.
        least: in the units of the codes, and never taken less than 2.5 times the root
            mean square of `left`'s coordinates: noise is no absorption.
        above: default `chance_cosine(m, d)`: closer than random directions get.
        fewest: rows on which j must fire to be judged.

    Returns: the dictionary, and how many atoms were changed.
    """
    m, d = W.shape
    above = chance_cosine(m, d) if above is None else above
    on = codes.value > 0
    used = codes.index[on].bincount(minlength=m)
    least = max(float(least), 2.5 * left.square().mean().sqrt().item())
    cosine = W @ W.T
    rarer = used[:, None] <= used
    cosine = cosine.masked_fill(rarer | (used < fewest)[None, :], -1)
    # Now cosine[i, j] > −1 only where i is the more frequent and j can be judged.
    nearest = cosine.amax(0)
    out, changed = W.clone(), 0
    rows, places = on.nonzero(as_tuple=True)
    atoms = codes.index[rows, places]
    by_atom = atoms.argsort(stable=True)
    starts = torch.cat([used.new_zeros(1), used.cumsum(0)])
    for j in (nearest > above).nonzero().flatten().tolist():
        mine = by_atom[starts[j] : starts[j + 1]][:2000]
        r = left[rows[mine]]
        z_j = codes.value[rows[mine], places[mine]]
        for i in cosine[:, j].argsort(descending=True)[:3].tolist():
            c = cosine[i, j].item()
            if c <= above:
                break
            z_i = (codes.value[rows[mine]] * (codes.index[rows[mine]] == i)).sum(1)
            # Correlations of r = left + z_i W_i + z_j W_j with both, then 2 × 2.
            a = r @ W[i] + z_i + c * z_j
            b = r @ W[j] + c * z_i + z_j
            alpha = (a - c * b) / (1 - c * c)
            if (alpha.abs() > least).double().mean() > share:
                new = out[j] - (out[j] @ W[i]) * W[i]
                if new.norm() > 0.1:
                    out[j] = new / new.norm()
                    changed += 1
                break
    return out, changed
