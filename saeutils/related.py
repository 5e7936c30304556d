"""Two synthetic "models" that see the same rows and share some of their features.

    pair = related(truth, shared=0.5, directions="rotated", seed=1)
    a, b = pair.sample(10_000)     # row r of both belongs to one input
    pair.in_a, pair.in_b           # the same feature's number in each: the answer key

What a score between models ought to say is then known.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from saeutils import firing
from saeutils.synthetic import Sample, Synthetic, keyed_generator

DIRECTIONS = ("same", "rotated", "random")
MAGNITUDES = ("same", "own")


class PairSample(NamedTuple):
    """The same inputs, as each model sees them."""

    a: Sample
    b: Sample


@dataclass(frozen=True, eq=False)
class Related:
    """Two truths, and which features are one and the same."""

    a: Synthetic
    b: Synthetic
    in_a: Int64[Tensor, " shared"]
    in_b: Int64[Tensor, " shared"]
    magnitudes: str

    def sample(self, rows: int, *, seed: int = 0) -> PairSample:
        """`rows` inputs. Raises ValueError for rows < 1."""
        parts = []
        for number, one in enumerate(self.a._blocks(rows, seed, 0)):
            other = self._second(one.acts, number, seed)
            parts.append((*one, *other))
        x_a, acts_a, x_b, acts_b = (torch.cat(p) for p in zip(*parts, strict=True))
        return PairSample(Sample(x_a, acts_a), Sample(x_b, acts_b))

    def _second(self, acts_a: Tensor, number: int, seed: int) -> Sample:
        """What b sees: a shared feature fires with a's as often as its law allows.

        Feature i fires in b where u_i < q_i, and u_i is uniform. Of a shared feature,
        u_i < p_i exactly where it fires in a. Under a copula u_i becomes
        Φ(√(1 − ρ) Φ⁻¹(u_i) + √ρ g), g normal and shared by its block.
        """
        b, size = self.b, (len(acts_a), self.b.n)
        generator = keyed_generator(b.device, b.config.seed, seed, number, 7)
        own = dict(generator=generator, device=generator.device)
        u = torch.rand(size, **own)
        in_a = acts_a[:, self.in_a] > 0
        p, r = self.a.rates[self.in_a], u[:, self.in_b]
        u[:, self.in_b] = torch.where(in_a, p * r, p + (1 - p) * r)
        if isinstance(b.law, firing.Copula):
            g = torch.randn(size[0], int(b.law.block.max()) + 1, **own)
            root = b.law.factor[:, 0]
            z = (1 - root**2).sqrt() * torch.special.ndtri(u) + root * g[:, b.law.block]
            u = torch.special.ndtr(z)
        x, acts = b._from(u < b.rates, generator)
        if self.magnitudes == "same":
            both = in_a & (acts[:, self.in_b] > 0)
            change = (acts_a[:, self.in_a] - acts[:, self.in_b]) * both
            acts[:, self.in_b] += change
            x = x + change @ b.W[self.in_b]
        return Sample(x, acts)


def related(
    truth: Synthetic,
    *,
    shared: int | float = 0.5,
    directions: str = "rotated",
    magnitudes: str = "same",
    frequency: str | None = None,
    correlation: int | float = 0,
    seed: int = 1,
) -> Related:
    """A second model of as many features, `shared` of them (rounded) the first's.

    Args:
        directions: of shared features in b. same: as in a. rotated: all by one random
            rotation. random: drawn anew, so that only firing ties the models.
        magnitudes: same, or own: drawn independently of a's.
        frequency: rates of b by another law (`firing.rates`), dealt out at random;
            None: a shared feature keeps its rate.
        correlation: of the firing in b of two features of a block of `config.group`
            neighbours in rate, shared or private; rates are kept. Where a's features
            fire independently; else what these have in common comes on top.
        seed: of b.

    Raises: ValueError for a share outside [0, 1], a correlation outside [0, 1), or an
        unknown option.
    """
    if not 0 <= shared <= 1:
        raise ValueError(f"shared {shared}: expected a share between 0 and 1")
    if directions not in DIRECTIONS or magnitudes not in MAGNITUDES:
        raise ValueError(
            f"directions {directions!r}, magnitudes {magnitudes!r}: expected one of "
            f"{[*DIRECTIONS]} and one of {[*MAGNITUDES]}"
        )
    n, config = truth.n, truth.config
    b = Synthetic(replace(config, seed=config.seed + 1_000_003 * (seed + 1)))
    generator = keyed_generator("cpu", config.seed, seed, 2**31 + 1)
    count = round(shared * n)
    in_a = torch.randperm(n, generator=generator)[:count]
    in_b = torch.randperm(n, generator=generator)[:count]
    p = truth.rates[torch.randperm(n, generator=generator)].clone()
    if frequency is None:
        private = torch.ones(n, dtype=torch.bool)
        private[in_b] = False
        unused = torch.ones(n, dtype=torch.bool)
        unused[in_a] = False
        p[in_b], p[private] = truth.rates[in_a], truth.rates[unused]
    else:
        options = dict(exponent=config.exponent, largest=config.largest)
        p = firing.rates(n, config.l0, frequency, **options)[
            torch.randperm(n, generator=generator)
        ]
    b.law = _law(p, config.group, correlation)
    if directions != "random":
        rotation = torch.eye(truth.d)
        if directions == "rotated":
            noise = torch.randn(truth.d, truth.d, generator=generator)
            rotation = torch.linalg.qr(noise)[0]
        b.W[in_b] = truth.W[in_a] @ rotation
    return Related(truth, b, in_a, in_b, magnitudes)


def _law(p: Tensor, size: int, correlation: int | float) -> firing.Law:
    if not correlation:
        return firing.Independent(p)
    block = torch.empty_like(p, dtype=torch.int64)
    block[p.argsort(descending=True, stable=True)] = torch.arange(len(p)) // size
    mean = firing.sums_by(p, block) / torch.bincount(block)
    rho = firing.latent_correlation(mean, correlation)
    return firing.Copula(p, rho.sqrt()[block, None], block)
