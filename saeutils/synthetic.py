"""Activations whose features are known: the oracle of this collection.

    truth = Synthetic(SyntheticConfig(n=512, d=128, l0=8, firing="hierarchy"))
    print(truth.self_check())          # what was asked for, and what came out
    train(truth.rows(100_000), ...)    # or truth.stream(10**9): any length, no memory
    sample = truth.sample(10_000, seed=1)          # rows, and who fired how strongly

A row is  x = b + Σ_i a_i W_i + ε,  W_i of length 1, a_i > 0 where feature i fires.
Row r of stream s is a function of (config, s, r) alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from saeutils import firing
from saeutils.known_directions import directions
from saeutils.store import Batch, Store, check_batches
from saeutils.synthetic_check import Check, check

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Check", "Sample", "Stream", "Synthetic", "SyntheticConfig"]

GEOMETRIES = ("random", "orthogonal", "clustered")
FIRINGS = (
    *("independent", "correlated", "low-rank", "groups", "exclusive"),
    *("hierarchy", "composed"),
)
MAGNITUDES = ("constant", "uniform", "half-normal", "normal")


@dataclass(frozen=True)
class SyntheticConfig:
    """What is generated. Raises ValueError for what contradicts itself."""

    n: int = 512
    """Features."""
    d: int = 128
    """Dimensions of a row."""
    l0: int | float = 8
    """Features that fire on a row, on average."""

    geometry: str = "random"
    """random: independent directions. orthogonal: pushed apart (exactly orthogonal
    for n ≤ d). clustered: `cluster` features around each of n / cluster centres."""
    cluster: int = 8
    cluster_cosine: int | float = 0.5
    """Mean cosine of two features of a cluster."""

    frequency: str = "zipf"
    """uniform, zipf or decay; see `firing.rates`."""
    exponent: int | float = 1.0
    largest: int | float = 0.1
    """Largest rate of a feature (of a root, a set, where firing has such)."""

    firing: str = "independent"
    """independent, correlated (blocks), low-rank, groups, exclusive, hierarchy or
    composed; see `saeutils.firing`."""
    group: int = 8
    """Features of a block, group, exclusive set; children of a parent; of a half."""
    correlation: int | float = 0.5
    """correlated: of the firing of two features of a block."""
    rank: int = 16
    scale: int | float = 0.15
    """low-rank: F has `rank` columns of N(0, scale²)."""
    chance: int | float = 0.1
    """groups: probability that a row draws a group."""
    child_share: int | float = 0.8
    """hierarchy: share of a parent's firings on which one of its children fires."""

    magnitude: str = "uniform"
    """constant: 1. uniform: in 0.5 … 1.5. half-normal: |N(0, 1)|. normal:
    |N(1, 0.25²)|."""
    noise: int | float = 0.0
    """ε is normal, √(E‖ε‖² / E‖Σ a_i W_i‖²) = noise."""
    bias: int | float = 0.0
    """Length of b."""
    seed: int = 0

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"SyntheticConfig: {message}")

        for name, allowed in (
            ("geometry", GEOMETRIES),
            ("firing", FIRINGS),
            ("magnitude", MAGNITUDES),
        ):
            value = getattr(self, name)
            need(value in allowed, f"{name} {value!r} is none of {[*allowed]}")
        need(self.n >= 1 and self.d >= 1, f"n {self.n}, d {self.d}: at least 1")
        need(self.noise >= 0, f"noise must not be negative, got {self.noise}")
        need(self.group >= 1, f"group must be at least 1, got {self.group}")
        unit = {"hierarchy": 1 + self.group, "composed": 2 * self.group}
        size = unit.get(self.firing, 1)
        need(
            self.n % size == 0,
            f"{self.firing} with group {self.group} wants n in multiples of {size}, "
            f"got {self.n}",
        )
        if self.firing == "hierarchy":
            need(0 < self.child_share <= 1, "child_share must lie in (0, 1]")
        if self.firing == "groups":
            need(
                self.largest <= self.chance <= 1,
                f"groups want largest {self.largest} ≤ chance {self.chance} ≤ 1",
            )
        if self.firing == "low-rank":
            need(
                self.rank * self.scale**2 < 1,
                f"rank {self.rank} · scale² leaves no variance of one's own; "
                f"scale must be below {self.rank**-0.5:.3g}",
            )
        if self.geometry == "clustered":
            need(self.n % self.cluster == 0, f"n must be a multiple of {self.cluster}")
            need(0 <= self.cluster_cosine < 1, "cluster_cosine must lie in [0, 1)")
        law(self, torch.Generator().manual_seed(0))


class Sample(NamedTuple):
    """Rows and the truth about them."""

    rows: Float[Tensor, "rows d"]
    acts: Float[Tensor, "rows n"]
    """a: zero where a feature does not fire."""


class Synthetic:
    """A ground truth that can be drawn from.

    Attributes:
        W: (n, d) directions of length 1.  b: (d,).  law: who fires (`law.rates`).
        noise: standard deviation of ε in each dimension.
    """

    def __init__(self, config: SyntheticConfig, device: str = "cpu") -> None:
        self.config, self.device = config, device
        # Not manual_seed(seed): an SAE that starts from the same seed would start at,
        # or near, the truth.
        generator = keyed_generator("cpu", config.seed, 2**31)
        self.W = directions(config, generator).to(device)
        self.law = _to(law(config, generator), device)
        b = torch.nn.functional.normalize(
            torch.randn(config.d, generator=generator), dim=0
        )
        self.b = (config.bias * b).to(device)
        self.noise = config.noise * self._signal() if config.noise else 0.0

    @property
    def n(self) -> int:
        return len(self.W)

    @property
    def d(self) -> int:
        return self.W.shape[1]

    @property
    def rates(self) -> Float[Tensor, " n"]:
        """Probability that each feature fires."""
        return self.law.rates

    def sample(self, rows: int, *, seed: int = 0, start: int = 0) -> Sample:
        """Rows start … start + rows − 1 of stream `seed`; the acts are dense.

        Raises: ValueError for rows < 1 or a negative start.
        """
        parts = list(self._blocks(rows, seed, start))
        return Sample(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def rows(
        self, rows: int, *, seed: int = 0, start: int = 0
    ) -> Float[Tensor, "rows d"]:
        """`sample` without the acts: they are never held all at once."""
        return torch.cat([x for x, _ in self._blocks(rows, seed, start)])

    def stream(self, rows: int, *, seed: int = 0) -> "Stream":
        """A store of so many rows that holds none of them."""
        return Stream(self, rows, seed)

    def self_check(self, rows: int = 50_000, *, seed: int = 12345) -> Check:
        """What was achieved, over so many rows: see `synthetic_check.Check`."""
        return check(self, rows, seed)

    def with_(self, **changes) -> "Synthetic":
        """Another truth with some of the configuration changed."""
        return Synthetic(replace(self.config, **changes), self.device)

    @property
    def block(self) -> int:
        """Rows that are drawn together."""
        return max(64, min(4096, 2**24 // self.n))

    def _blocks(self, rows: int, seed: int, start: int) -> Iterator[Sample]:
        if rows < 1 or start < 0:
            raise ValueError(f"rows {rows}, start {start}: expected ≥ 1 and ≥ 0")
        stop = start + rows
        for number in range(start // self.block, -(-stop // self.block)):
            first = number * self.block
            part = slice(max(start - first, 0), stop - first)
            x, acts = self._block(number, seed)
            yield Sample(x[part], acts[part])

    def _block(self, number: int, seed: int) -> Sample:
        generator = keyed_generator(self.device, self.config.seed, seed, number)
        fires = self.law.draw(self.block, generator)
        return self._from(fires, generator)

    def _from(self, fires: Tensor, generator: torch.Generator) -> Sample:
        """Magnitudes and noise for who fires."""
        row, feature = fires.nonzero(as_tuple=True)
        a = _magnitudes(self.config.magnitude, len(row), generator)
        acts = torch.zeros(fires.shape, device=fires.device)
        acts[row, feature] = a
        starts = torch.bincount(row, minlength=len(fires)).cumsum(0).roll(1)
        starts[0] = 0
        x = torch.nn.functional.embedding_bag(
            feature, self.W, starts, mode="sum", per_sample_weights=a
        )
        if self.noise:
            x += self.noise * torch.randn(x.shape, generator=generator, device=x.device)
        return Sample(x + self.b, acts)

    def _signal(self) -> float:
        """Root mean square of a coordinate of Σ a_i W_i, over one block."""
        self.noise = 0.0
        x, _ = self._block(0, -1)
        return (x - self.b).square().mean().sqrt().item()


class Stream(Store):
    """Rows of a `Synthetic`, drawn when they are read. Never shuffled: every row is
    drawn by itself, so the order of the stream is as random as any."""

    dtype, hook = torch.float32, None

    def __init__(self, truth: Synthetic, rows: int, seed: int) -> None:
        if rows < 1:
            raise ValueError(f"a stream of {rows} rows: expected at least 1")
        self.truth, self.seed, self._rows, self.d_in = truth, seed, rows, truth.d
        self._last: tuple[int, Tensor] = -1, torch.empty(0)

    def __len__(self) -> int:
        return self._rows

    def gather(self, index) -> Float32[Tensor, "rows d_in"]:
        index = torch.as_tensor(index, dtype=torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self):
            raise IndexError(f"rows beyond 0 … {len(self) - 1}")
        out = torch.empty(len(index), self.d_in, device=self.truth.device)
        numbers = index // self.truth.block
        for number in numbers.unique().tolist():
            here = numbers == number
            x = self._drawn(number)
            out[here] = x[(index[here] % self.truth.block).to(x.device)]
        return out

    def _drawn(self, number: int) -> Float32[Tensor, "block d_in"]:
        """Rows of a block. The last one is kept: batches are smaller than blocks."""
        if self._last[0] != number:
            self._last = number, self.truth._block(number, self.seed).rows
        return self._last[1]

    def _read(self, start: int, out: Float32[Tensor, "rows d_in"]) -> None:
        if len(out):
            out.copy_(self.truth.rows(len(out), seed=self.seed, start=start))

    def batches(
        self,
        batch_size: int,
        *,
        seed: int = 0,
        steps: int | None = None,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: str = "full",
        workers: int = 0,
    ) -> Iterator[Batch]:
        """The next rows at each step; after the last row the first again.

        As `Store.batches`, but for the order: `seed` changes nothing (another stream
        does), and no thread reads ahead, whatever `workers` says.

        Raises: ValueError for numbers out of range, or shuffle "buffer".
        """
        check_batches(batch_size, rank, world_size, start, steps, workers)
        if shuffle != "full":
            raise ValueError(
                f"shuffle {shuffle!r}: rows of a stream are drawn one by one, in an "
                'order as random as any; leave it at "full"'
            )
        stride = batch_size * world_size
        last = len(self) if steps is None else steps * stride
        return self._batches(
            range(start * stride + rank * batch_size, last, stride), batch_size, last
        )

    def _batches(self, firsts: range, size: int, last: int) -> Iterator[Batch]:
        for first in firsts:
            index = torch.arange(first, min(first + size, last)) % len(self)
            yield Batch(self.gather(index), index)

    @property
    def provenance(self) -> "pd.DataFrame":
        import pandas as pd

        return pd.DataFrame(index=pd.RangeIndex(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the configuration, the stream and its length."""
        text = f"{self.truth.config} {self.seed} {len(self)}"
        return sha256(text.encode()).hexdigest()


def law(config: SyntheticConfig, generator: torch.Generator) -> firing.Law:
    """The law that a configuration asks for.

    Features are numbered by falling rate, but for hierarchy and composed, where a
    parent, or a set, comes before its own: all parents first, then their children.
    """
    n, size = config.n, config.group
    shape = dict(exponent=config.exponent, largest=config.largest)

    def rates(count: int, l0: int | float) -> Tensor:
        return firing.rates(count, l0, config.frequency, **shape)

    if config.firing == "hierarchy":
        roots = rates(n // (1 + size), config.l0 / (1 + config.child_share))
        children = (roots * (config.child_share / size)).repeat_interleave(size)
        parent = torch.arange(len(roots)).repeat_interleave(size)
        none = torch.full((len(roots),), -1)
        return firing.Hierarchy(torch.cat([roots, children]), torch.cat([none, parent]))
    if config.firing == "composed":
        sets = rates(n // (2 * size), config.l0 / 2)
        p = (sets / size).repeat_interleave(2 * size)
        return firing.Composed(p, torch.arange(n) // size)
    p = rates(n, config.l0)
    # Neighbours in rate share a block, so that one latent correlation serves it …
    neighbours = torch.arange(n) // size
    # … but a set or a group holds frequent and rare features.
    spread = torch.arange(n) % -(-n // size)
    if config.firing == "correlated":
        mean = firing.sums_by(p, neighbours) / torch.bincount(neighbours)
        rho = firing.latent_correlation(mean, config.correlation)
        return firing.Copula(p, rho.sqrt()[neighbours, None], neighbours)
    if config.firing == "low-rank":
        factor = config.scale * torch.randn(n, config.rank, generator=generator)
        longest = factor.norm(dim=1, keepdim=True) / 0.99
        return firing.Copula(p, factor / longest.clamp_min(1))
    if config.firing == "groups":
        return firing.Groups(p, spread, float(config.chance))
    if config.firing == "exclusive":
        if float(firing.sums_by(p, spread).max()) > 1:
            raise ValueError(
                f"SyntheticConfig: a set of {size} features would fire more than once "
                "a row; ask for a smaller l0, group or largest"
            )
        return firing.Exclusive(p, spread)
    return firing.Independent(p)


def _magnitudes(kind: str, count: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    if kind == "constant":
        return torch.ones(count, device=device)
    if kind == "uniform":
        return torch.rand(count, generator=generator, device=device) + 0.5
    normal = torch.randn(count, generator=generator, device=device)
    return (normal if kind == "half-normal" else 1 + normal / 4).abs()


def keyed_generator(device: str, *key: int) -> torch.Generator:
    """Random numbers that depend on the key alone, and on no `manual_seed(seed)`."""
    words = np.random.SeedSequence([part % 2**32 for part in key]).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def _to(law: firing.Law, device: str) -> firing.Law:
    moved = {k: v.to(device) for k, v in vars(law).items() if isinstance(v, Tensor)}
    return replace(law, **moved)
