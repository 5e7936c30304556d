"""Learning atoms that fire together anew, by a rule that never looks at a truth.

Where features fire together often, refinement stalls: one atom takes the middle of a
group and others the differences to it, or one atom serves several features, and no
small step leads out. Yet each feature fires alone on some rows, and there the group's
part of x points exactly along it: directions of such rows crowd, while those of mixed
rows spread, since magnitudes vary. So, for each group of atoms that fire together:

    r       what the rows are without all other atoms' parts
    crowds  the directions near which most rows lie, each next one among the rows that
            those before do not add up to (non-negative least squares)
    choice  an atom that others of the group add up to goes; the new atoms replace the
            old where ½‖r − zW‖² + 2λ² ‖z‖₀ falls
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saeutils._coding_kernels import atom_sweep, statistics
from saeutils.sparse_coding import SparseCodes, lasso

TOGETHER = 0.15  # correlation of firing from which atoms belong together
NEAR = 0.97  # cosine within which rows crowd
APART = 0.35  # of a unit vector, left by what others add up to
FEWEST = 5  # rows of a crowd


@torch.no_grad()
def regroup(
    W: Float[Tensor, "m d"],
    codes: SparseCodes,
    left: Float[Tensor, "rows d"],
    penalty: int | float,
    *,
    most: int = 16,
    rows: int = 1000,
) -> tuple[Float[Tensor, "m d"], int]:
    """Learns each group anew, and keeps what explains its rows with fewer codes.

    Atoms that become too many leave by Σ ½z² − 2λ², least first. Where they become
    too few, rows of zeros are left, for `refinement.reseed`.

    Args:
        left: rows − b − codes · W.
        penalty: λ; a code is worth at least 2λ, as in `sparse_coding.lasso`'s re-fit.
        most: atoms of a group.
        rows: of each group, about; as many for rare atoms as for frequent ones.

    Returns: the dictionary, and how many groups were changed.
    """
    m, cost = len(W), 2 * float(penalty) ** 2
    together, used = cofiring(codes, m)
    near = together > TOGETHER
    row, place = (codes.value > 0).nonzero(as_tuple=True)
    atom, value = codes.index[row, place], codes.value[row, place]
    by_atom = atom.argsort(stable=True)
    mine = row[by_atom].split(used.tolist())
    gain = W.new_zeros(m).index_add_(0, atom, value.square() / 2 - cost)
    strength = (together * near).sum(1)
    todo, keep = strength > 0, torch.ones(m, dtype=torch.bool)
    new, new_gain, changed = [], [], 0
    for j in strength.argsort(descending=True).tolist():
        if not (todo[j] and keep[j]):
            continue
        others = (near[j] & keep).nonzero().flatten()
        best = together[j, others].argsort(descending=True)[: most - 1]
        group = torch.cat([torch.tensor([j]), others[best]])
        todo[group] = False
        if len(group) < 2:
            continue
        few = max(30, rows // len(group))
        here = torch.cat([mine[i][:few] for i in group.tolist()]).unique()
        place_of = torch.full((m,), len(group))
        place_of[group] = torch.arange(len(group))
        z = W.new_zeros(len(here), len(group) + 1)
        z.scatter_add_(1, place_of[codes.index[here]], codes.value[here])
        r = left[here] + z[:, :-1] @ W[group]
        now = _objective(r, z[:, :-1], W[group], cost)
        better, z = learn(r, W[group], penalty)
        if len(better) and _objective(r, z, better, cost) < 0.98 * now:
            keep[group] = False
            new.append(better)
            weight = used[group].sum() / (z > 0).sum().clamp_min(1)
            new_gain.append((z.square() / 2 - cost * (z > 0)).sum(0) * weight)
            changed += 1
        else:
            stay = simple(W[group])
            gone = torch.ones(len(group), dtype=torch.bool)
            gone[stay] = False
            keep[group[gone]] = False
    W, gain = torch.cat([W[keep], *new]), torch.cat([gain[keep], *new_gain])
    if len(W) > m:
        return W[gain.topk(m).indices], changed
    return torch.cat([W, W.new_zeros(m - len(W), W.shape[1])]), changed


def cofiring(
    codes: SparseCodes, m: int
) -> tuple[Float[Tensor, "m m"], Int64[Tensor, " m"]]:
    """Correlation of the firing of each two atoms (0 where they meet on fewer than
    FEWEST rows), and the number of rows of each."""
    on = (codes.value > 0).float()
    both, none = torch.zeros(m, m), torch.zeros(m, 1)
    used = torch.zeros(m, dtype=torch.int64)
    arrays = (codes.index, on, on.new_zeros(len(on), 1), both, none, used)
    statistics(*(t.contiguous().numpy() for t in arrays))
    p = used / len(on)
    deviation = (p * (1 - p)).sqrt().clamp_min(1e-9)
    phi = (both / len(on) - p[:, None] * p) / (deviation[:, None] * deviation)
    return (phi * (both >= FEWEST)).fill_diagonal_(0), used


def learn(
    r: Float[Tensor, "rows d"], W: Float[Tensor, "g d"], penalty: int | float
) -> tuple[Float[Tensor, "h d"], Float[Tensor, "rows h"]]:
    """New atoms for the rows of a group, and their codes; up to four more than W."""
    _, basis = torch.linalg.eigh(r.T @ r)
    basis = basis[:, -len(W) - 2 :]  # noise outside of it would hide the crowds
    new = crowds(r @ basis, len(W) + 4) @ basis.T
    if len(new):
        new = _refined(r, new, penalty, 6)
        stay = simple(new)
        if len(stay) < len(new):
            new = _refined(r, new[stay], penalty, 3)
    return new, _codes(r, new, penalty).dense(len(new)) if len(new) else r[:, :0]


def crowds(r: Float[Tensor, "rows d"], most: int) -> Float[Tensor, "h d"]:
    """Directions of length 1 near which rows crowd, the most crowded first."""
    length = r.norm(dim=1)
    u = r / length[:, None].clamp_min(1e-9)
    free = (length > 0.3 * length.median()).float()
    close, out = (u @ u.T > NEAR).float(), []
    while len(out) < most:
        score = (close @ free) * free
        centre = int(score.argmax())
        if score[centre] < FEWEST:
            break
        direction = r[(close[centre] * free) > 0].sum(0)
        out.append(direction / direction.norm().clamp_min(1e-9))
        rest = free.nonzero().flatten()  # what few add up to, more do as well
        free[rest] = (_left(u[rest], torch.stack(out)) > APART).float()
    return torch.stack(out) if out else r[:0]


def simple(W: Float[Tensor, "g d"]) -> list[int]:
    """The atoms that are no non-negative sum of others, the worst leaving first."""
    stay = list(range(len(W)))
    while len(stay) > 1:
        left = [
            _left(W[i : i + 1], W[[j for j in stay if j != i]]).item() for i in stay
        ]
        if min(left) > APART:
            break
        stay.pop(left.index(min(left)))
    return stay


def _left(u: Tensor, W: Tensor) -> Tensor:
    """Length of what non-negative least squares leaves of each row of u."""
    return (u - lasso(u, W, 1e-3, sweeps=200).times(W)).norm(dim=1)


def _codes(r: Tensor, W: Tensor, penalty: int | float) -> SparseCodes:
    return lasso(r, W, penalty, refit=True, smallest=2 * penalty, sweeps=100)


def _refined(r: Tensor, W: Tensor, penalty: int | float, rounds: int) -> Tensor:
    W = W.clone().contiguous()
    for _ in range(rounds):
        codes = _codes(r, W, penalty)
        A, B = torch.zeros(len(W), len(W)), torch.zeros_like(W)
        used = torch.zeros(len(W), dtype=torch.int64)
        statistics(*(t.contiguous().numpy() for t in (*codes, r, A, B, used)))
        for _ in range(3):
            atom_sweep(W.numpy(), A.numpy(), B.numpy())
    return W


def _objective(r: Tensor, z: Tensor, W: Tensor, cost: float) -> float:
    return ((r - z @ W).square().sum() / 2 + cost * (z > 0).sum()).item()
