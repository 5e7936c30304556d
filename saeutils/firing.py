"""Which features fire together: laws that keep every feature's rate exactly.

A law has the `rates` (P of firing, a feature), draws who fires on each of many rows,
every row by itself, and knows `joint`: the probability that two features fire on the
same row. `synthetic.self_check` holds what was drawn against it.

    Independent   each by itself
    Copula        a Gaussian threshold model, correlated in blocks or at low rank
    Groups        features of a group fire on the rows that draw the group
    Exclusive     at most one of a set fires on a row
    Hierarchy     a child fires only with its parent, and never with its siblings
    Composed      of each set, one of its first half with one of its second half
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

Rates = Float[Tensor, " n"]


@runtime_checkable
class Law(Protocol):
    """How features fire."""

    rates: Tensor

    def draw(self, rows: int, generator: torch.Generator) -> Tensor: ...
    def joint(self, i: Tensor, j: Tensor) -> Tensor: ...


def rates(
    n: int,
    l0: int | float,
    frequency: str = "zipf",
    *,
    exponent: int | float = 1.0,
    largest: int | float = 0.1,
) -> Rates:
    """Rates of n features, falling, none above `largest`, that sum to `l0`.

    uniform: all alike. zipf: ∝ rank^−exponent. decay: ∝ 100^(−rank·exponent/n), so
    with exponent 1 the first fires 100 times as often as the last. What `largest`
    cuts off goes to the others in proportion: nothing saturates, and the sum holds.

    Raises: ValueError for an unknown law, or when n · largest < l0.
    """
    rank = torch.arange(1, n + 1, dtype=torch.float64)
    shapes = {
        "uniform": torch.ones_like(rank),
        "zipf": rank**-exponent,
        "decay": 100 ** (-(rank - 1) * exponent / n),
    }
    if frequency not in shapes:
        raise ValueError(f"frequency {frequency!r} is none of {[*shapes]}")
    if not 0 < largest <= 1 or n * largest < l0 or l0 <= 0:
        raise ValueError(
            f"{n} features that fire at most at rate {largest} cannot fire {l0} a "
            "row: ask for 0 < l0 ≤ n · largest"
        )
    weight, capped = shapes[frequency], 0
    while True:
        rest = weight[capped:] * ((l0 - capped * largest) / weight[capped:].sum())
        more = int((rest > largest * (1 + 1e-9)).sum())
        if not more:
            return torch.cat([rest.new_full((capped,), largest), rest]).float()
        capped += more


@dataclass(frozen=True, eq=False)
class Independent:
    """Each feature fires with its rate, whatever the others do."""

    rates: Rates

    def draw(self, rows: int, generator: torch.Generator) -> Bool[Tensor, "rows n"]:
        return _uniform(rows, len(self.rates), generator) < self.rates

    def joint(self, i: Tensor, j: Tensor) -> Tensor:
        return self.rates[i] * self.rates[j]


@dataclass(frozen=True, eq=False)
class Copula:
    """Feature i fires where z_i > Φ⁻¹(1 − p_i),  z = F g + √(1 − ‖F_i‖²) e.

    g and e are standard normal; the latent correlation of i and j is F_i · F_j.
    """

    rates: Rates
    factor: Float[Tensor, "n rank"]
    block: Int64[Tensor, " n"] | None = None
    """Where each feature loads on one entry of g alone: which; F has one column."""

    def draw(self, rows: int, generator: torch.Generator) -> Bool[Tensor, "rows n"]:
        device = self.rates.device
        rank = self.factor.shape[1] if self.block is None else int(self.block.max()) + 1
        g = torch.randn(rows, rank, generator=generator, device=device)
        shared = (
            g @ self.factor.T
            if self.block is None
            else g[:, self.block] * self.factor[:, 0]
        )
        own = (1 - self.factor.square().sum(1)).clamp_min(0).sqrt()
        e = torch.randn(rows, len(self.rates), generator=generator, device=device)
        return shared + own * e > _threshold(self.rates)

    def joint(self, i: Tensor, j: Tensor) -> Tensor:
        rho = (self.factor[i] * self.factor[j]).sum(1)
        if self.block is not None:
            rho = rho * (self.block[i] == self.block[j])
        return both_above(
            _threshold(self.rates[i]), _threshold(self.rates[j]), rho
        ).float()


@dataclass(frozen=True, eq=False)
class Groups:
    """A row draws each group with probability `chance`; its members fire then.

    Within a drawn group member i fires with probability p_i / chance, by itself.
    """

    rates: Rates
    group: Int64[Tensor, " n"]
    chance: float

    def draw(self, rows: int, generator: torch.Generator) -> Bool[Tensor, "rows n"]:
        drawn = _uniform(rows, int(self.group.max()) + 1, generator) < self.chance
        u = _uniform(rows, len(self.rates), generator)
        return drawn[:, self.group] & (u < self.rates / self.chance)

    def joint(self, i: Tensor, j: Tensor) -> Tensor:
        product = self.rates[i] * self.rates[j]
        same = self.group[i] == self.group[j]
        return torch.where(same, product / self.chance, product)


@dataclass(frozen=True, eq=False)
class Exclusive:
    """Of each set at most one feature fires on a row."""

    rates: Rates
    group: Int64[Tensor, " n"]

    def draw(self, rows: int, generator: torch.Generator) -> Bool[Tensor, "rows n"]:
        u = _uniform(rows, int(self.group.max()) + 1, generator)[:, self.group]
        low, high = _slots(self.rates, self.group)
        return (u >= low) & (u < high)

    def joint(self, i: Tensor, j: Tensor) -> Tensor:
        return self.rates[i] * self.rates[j] * (self.group[i] != self.group[j])


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """Child c fires with probability p_c / p_parent where its parent does.

    Siblings exclude each other, so Σ p_c of the children may not exceed p_parent.
    """

    rates: Rates
    parent: Int64[Tensor, " n"]
    """Of a child its parent, −1 for those without."""

    def draw(self, rows: int, generator: torch.Generator) -> Bool[Tensor, "rows n"]:
        child = self.parent >= 0
        fires = _uniform(rows, len(self.rates), generator) < self.rates
        above = self.parent[child]
        # One number for each parent and row says which of its children fires, if any.
        u = _uniform(rows, int(above.max()) + 1, generator)[:, above]
        u = u * self.rates[above]
        low, high = _slots(self.rates[child], above)
        fires[:, child] = fires[:, above] & (u >= low) & (u < high)
        return fires

    def joint(self, i: Tensor, j: Tensor) -> Tensor:
        out = self.rates[i] * self.rates[j]
        for a, b in ((i, j), (j, i)):
            out = torch.where(self.parent[a] == b, self.rates[a], out)
        siblings = (self.parent[i] == self.parent[j]) & (self.parent[i] >= 0)
        return torch.where(siblings, torch.zeros_like(out), out)


@dataclass(frozen=True, eq=False)
class Composed:
    """Each set happens or not; when it does, one of each half fires, independently.

    Like colour and shape: never one without the other. Rates of the halves of a set
    must have the same sum, the probability that the set happens.
    """

    rates: Rates
    half: Int64[Tensor, " n"]
    """Number of each feature's half: 2s and 2s + 1 make set s."""

    def draw(self, rows: int, generator: torch.Generator) -> Bool[Tensor, "rows n"]:
        halves = int(self.half.max()) + 1
        chance = self._chance()
        happens = _uniform(rows, halves // 2, generator) < chance[::2]
        u = _uniform(rows, halves, generator)[:, self.half] * chance[self.half]
        low, high = _slots(self.rates, self.half)
        return happens[:, self.half // 2] & (u >= low) & (u < high)

    def joint(self, i: Tensor, j: Tensor) -> Tensor:
        product = self.rates[i] * self.rates[j]
        same_set = self.half[i] // 2 == self.half[j] // 2
        within = product / self._chance()[self.half[i]]
        out = torch.where(same_set, within, product)
        return out * (self.half[i] != self.half[j])

    def _chance(self) -> Tensor:
        return sums_by(self.rates, self.half)


def phi(p_i: Tensor, p_j: Tensor, both: Tensor) -> Tensor:
    """Pearson correlation of two events with these probabilities."""
    return (both - p_i * p_j) / (p_i * (1 - p_i) * p_j * (1 - p_j)).sqrt()


def both_above(
    h: Float[Tensor, " m"], k: Float[Tensor, " m"], rho: Float[Tensor, " m"]
) -> Float64[Tensor, " m"]:
    """P(x > h, y > k) of a standard bivariate normal with correlation rho.

    Q(h) Q(k) + 1/2π ∫₀^{asin ρ} exp(−(h² + k² − 2hk sin θ) / (2 cos² θ)) dθ, by 48
    Gauss–Legendre points. Source: Drezner and Wesolowsky (1990), after Plackett.
    """
    h, k, rho = (x.double()[:, None] for x in (h, k, rho))
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(48))
    half = rho.clamp(-1 + 1e-9, 1 - 1e-9).asin() / 2
    theta = half * (nodes.to(h) + 1)
    exponent = (h**2 + k**2 - 2 * h * k * theta.sin()) / (2 * theta.cos() ** 2)
    integral = (half * weights.to(h) * (-exponent).exp()).sum(1) / (2 * math.pi)
    tails = torch.special.ndtr(-h[:, 0]) * torch.special.ndtr(-k[:, 0])
    return tails + integral


def latent_correlation(p: Rates, target: int | float) -> Rates:
    """The copula's ρ at which two features of rate p correlate by `target`, by halves.

    Raises: ValueError unless 0 ≤ target < 1.
    """
    if not 0 <= target < 1:
        raise ValueError(f"correlation {target}: expected 0 ≤ correlation < 1")
    h, p = _threshold(p.double()), p.double()
    low, high = torch.zeros_like(p), torch.ones_like(p)
    for _ in range(40):
        middle = (low + high) / 2
        above = phi(p, p, both_above(h, h, middle)) > target
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return ((low + high) / 2).float()


def _threshold(p: Tensor) -> Tensor:
    return -torch.special.ndtri(p)


def _uniform(rows: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(rows, n, generator=generator, device=generator.device)


def sums_by(values: Tensor, group: Tensor) -> Tensor:
    """Sum of the values of each group."""
    return values.new_zeros(int(group.max()) + 1).index_add_(0, group, values)


def _slots(p: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Each feature's part of [0, Σ p of its group): an interval as long as p."""
    order = group.argsort(stable=True)
    running = p[order].double().cumsum(0)
    sums = sums_by(p.double(), group)
    high = torch.empty_like(running)
    high[order] = running - (sums.cumsum(0) - sums)[group[order]]
    return (high - p).float(), high.float()
