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
        """What b sees: a shared feature fires with a's as often as its rates allow.

        Of rates p in a and q in b: kept with probability q / p where q < p, else
        joined by firings of its own at rate (q − p) / (1 − p).
        """
        b = self.b
        generator = keyed_generator(b.device, b.config.seed, seed, number, 7)
        fires = b.law.draw(len(acts_a), generator)
        p, q = self.a.rates[self.in_a], b.rates[self.in_b]
        u = torch.rand(
            2, len(acts_a), len(p), generator=generator, device=generator.device
        )
        in_a = acts_a[:, self.in_a] > 0
        more = u[1] < ((q - p) / (1 - p)).clamp_min(0)
        fires[:, self.in_b] = (in_a & (u[0] < q / p)) | more
        x, acts = b._from(fires, generator)
        if self.magnitudes == "same":
            both = in_a & fires[:, self.in_b]
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
    seed: int = 1,
) -> Related:
    """A second model of as many features, `shared` of them (rounded) the first's.

    Args:
        directions: of shared features in b. same: as in a. rotated: all by one random
            rotation. random: drawn anew, so that only firing ties the models.
        magnitudes: same, or own: drawn independently of a's.
        frequency: rates of b by another law (`firing.rates`), dealt out at random;
            None: a shared feature keeps its rate.
        seed: of b. Its private features fire independently.

    Raises: ValueError for a share outside [0, 1], or an unknown option.
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
    b.law = firing.Independent(p)
    if directions != "random":
        rotation = torch.eye(truth.d)
        if directions == "rotated":
            noise = torch.randn(truth.d, truth.d, generator=generator)
            rotation = torch.linalg.qr(noise)[0]
        b.W[in_b] = truth.W[in_a] @ rotation
    return Related(truth, b, in_a, in_b, magnitudes)
