"""What a generator of synthetic activations achieved, against what was asked for.

The generators of earlier work were broken in ways that a look at such numbers would
have shown: active features drawn once a batch, probabilities that saturate, features
that are never used.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saeutils.firing import phi

VARIANCE_PAIRS = 2**18  # pairs of features that the variance of L0 is taken from


@dataclass(frozen=True)
class Check:
    """Asked for and achieved. `print` it."""

    rows: int
    l0_target: float
    l0: float
    """Mean number of features that fire on a row."""
    l0_sd: tuple[float, float]
    """Standard deviation of that number: asked for (√ΣΣ cov, of a sample of the pairs
    where there are more than `VARIANCE_PAIRS`), and achieved."""
    l0_quantiles: tuple[float, float, float]
    """0.05, 0.5, 0.95 of the number that fires."""
    rate_z: float
    """Largest |achieved − asked-for| rate of a feature, in standard errors."""
    unused: int
    """Features that never fired."""
    saturated: int
    """Features that fired on more than 99 % of the rows."""
    tied: tuple[float, float]
    """Of pairs that the law ties to each other: mean correlation asked for, and the
    largest |achieved − asked-for| mean, over the quarters of them in order of what was
    asked for."""
    untied: float
    """Mean |achieved − asked-for| correlation of as many pairs at random."""
    pair_z: float
    """Largest deviation, in standard errors, of the number of rows on which two
    features fire together from that asked for, over all these pairs."""
    repeated: float
    """Share of rows whose active set is that of the row before."""
    repeated_expected: float
    """The same between row i and a row far from it: what chance gives."""
    coherence: tuple[float, float]
    """Mean and largest, over features, of the cosine with the nearest other one."""
    noise: float
    """√(E‖ε‖² / E‖Σ a W‖²)."""

    @property
    def l0_error(self) -> float:
        """Relative."""
        return self.l0 / self.l0_target - 1

    def __str__(self) -> str:
        spread = ", ".join(f"{q:.0f}" for q in self.l0_quantiles)
        return "\n".join(
            [
                f"self-check over {self.rows:,} rows",
                f"  L0           {self.l0:.3f}, asked for {self.l0_target:.3f} "
                f"({self.l0_error:+.2%}); sd {self.l0_sd[1]:.2f}, asked for "
                f"{self.l0_sd[0]:.2f}; 5, 50, 95 %: {spread}",
                f"  rates        largest deviation {self.rate_z:.1f} standard errors; "
                f"unused {self.unused}, saturated {self.saturated}",
                f"  correlation  of tied pairs {self.tied[0]:+.3f}, off by at most "
                f"{self.tied[1]:.3f}; of others off by {self.untied:.4f}; largest "
                f"deviation of a pair {self.pair_z:.1f} standard errors",
                f"  rows         {self.repeated:.2%} repeat the active set of the row "
                f"before (chance {self.repeated_expected:.2%})",
                f"  coherence    nearest other feature: mean cosine "
                f"{self.coherence[0]:.2f}, largest {self.coherence[1]:.2f}",
                f"  noise        {self.noise:.3f} of the signal",
            ]
        )


@torch.no_grad()
def check(truth, rows: int, seed: int) -> Check:
    """Draw `rows` rows of stream `seed` and compare.

    Correlations are those of 0/1 firing. With small rates one pair's correlation is
    all sampling error, so tied pairs are averaged in four groups; `pair_z` looks at
    each pair by itself.
    """
    law, n = truth.law, truth.n
    generator = torch.Generator().manual_seed(seed)
    pairs = _pairs(law, n, generator)
    i, j = (p.to(truth.device) for p in pairs.unbind(1))
    counts, sizes, repeated, far = torch.zeros(n, device=truth.device), [], 0, 0
    both = torch.zeros(len(pairs), dtype=torch.float64, device=truth.device)
    signal = noise = 0.0
    seen = 0
    for x, acts in truth._blocks(rows, seed, 0):
        fires = acts > 0
        counts += fires.sum(0)
        sizes.append(fires.sum(1).cpu())
        if truth.noise:
            clean = acts @ truth.W
            signal += clean.square().sum().item()
            noise += (x - truth.b - clean).square().sum().item()
        repeated += int((fires[1:] == fires[:-1]).all(1).sum())
        half = len(fires) // 2
        far += int((fires[:half] == fires[half : 2 * half]).all(1).sum())
        seen += half
        for part in torch.arange(len(pairs)).split(2**14):
            together = fires[:, i[part]] & fires[:, j[part]]
            both[part] += together.sum(0)
    rate = counts / rows
    error = (law.rates * (1 - law.rates) / rows).sqrt().clamp_min(1e-12)
    joint = law.joint(i, j).double()
    asked = phi(law.rates[i].double(), law.rates[j].double(), joint)
    ri, rj = (rate[k].double().clamp(1 / rows, 1 - 1 / rows) for k in (i, j))
    off = phi(ri, rj, both / rows) - asked
    tied = (joint - law.rates[i] * law.rates[j]).abs() > 1e-7
    # Counts are near enough Poisson; this root makes them normal (Anscombe, 1948).
    z = 2 * ((both + 0.375).sqrt() - (rows * joint + 0.375).sqrt())
    order = asked[tied].argsort()
    quarters = [q for q in order.tensor_split(4) if len(q)]
    size = torch.cat(sizes).float()
    return Check(
        rows=rows,
        l0_target=law.rates.sum().item(),
        l0=size.mean().item(),
        l0_sd=(_l0_sd(law, n, generator), size.std().item()),
        l0_quantiles=tuple(
            size[: 2**22].quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
        ),
        rate_z=((rate - law.rates) / error).abs().max().item(),
        unused=int((counts == 0).sum()),
        saturated=int((rate > 0.99).sum()),
        tied=(
            (
                asked[tied].mean().item(),
                max(off[tied][q].mean().abs().item() for q in quarters),
            )
            if quarters
            else (0.0, 0.0)
        ),
        pair_z=z.abs().max().item() if len(z) else 0.0,
        untied=off[~tied].abs().mean().item() if (~tied).any() else 0.0,
        repeated=repeated / max(rows - 1, 1),
        repeated_expected=far / max(seen, 1),
        coherence=_coherence(truth.W),
        noise=(noise / signal) ** 0.5 if signal else 0.0,
    )


def _l0_sd(law, n: int, generator: torch.Generator) -> float:
    """√Var(number that fires) = √(Σ p(1 − p) + 2 Σ_{i<j} (p_ij − p_i p_j))."""
    p = law.rates.double()
    count = n * (n - 1) // 2
    if count <= VARIANCE_PAIRS:
        i, j = torch.triu_indices(n, n, 1)
    else:
        i = torch.randint(n, (VARIANCE_PAIRS,), generator=generator)
        # Another than i, every one equally likely.
        j = (i + 1 + torch.randint(n - 1, i.shape, generator=generator)) % n
    covariance = 0.0
    for a, b in zip(i.split(2**14), j.split(2**14), strict=True):
        a, b = a.to(p.device), b.to(p.device)
        covariance += (law.joint(a, b).double() - p[a] * p[b]).sum().item()
    if len(i):
        covariance *= count / len(i)
    return ((p * (1 - p)).sum().item() + 2 * covariance) ** 0.5


def _pairs(law, n: int, generator: torch.Generator, most: int = 1024) -> Tensor:
    """Pairs i < j: up to `most` that the law ties, and as many at random."""
    if n < 2:
        return torch.zeros(0, 2, dtype=torch.int64)
    candidates = torch.randint(n, (64 * most, 2), generator=generator)
    # Ties are mostly between neighbours in some numbering: offer these as well.
    for name in ("group", "block", "half", "parent"):
        value = getattr(law, name, None)
        if value is None:
            continue
        order = value.cpu().argsort(stable=True)
        for step in (1, 2, 3, 7):
            near = torch.stack([order[:-step], order[step:]], 1)
            candidates = torch.cat([candidates, near])
        if name == "parent":
            child = (value >= 0).nonzero().flatten().cpu()
            edges = torch.stack([value.cpu()[child], child], 1)
            candidates = torch.cat([candidates, edges])
    candidates = candidates.sort(1).values
    candidates = candidates[candidates[:, 0] < candidates[:, 1]].unique(dim=0)
    i, j = (c.to(law.rates.device) for c in candidates.unbind(1))
    tied = ((law.joint(i, j) - law.rates[i] * law.rates[j]).abs() > 1e-7).cpu()
    chosen = []
    for some in (candidates[tied], candidates[~tied]):
        keep = torch.randperm(len(some), generator=generator)[:most]
        chosen.append(some[keep])
    return torch.cat(chosen)


def _coherence(W: Float[Tensor, "n d"]) -> tuple[float, float]:
    best = []
    for start in range(0, len(W), 1024):
        cosine = (W[start : start + 1024] @ W.T).abs()
        cosine[:, start:].fill_diagonal_(0)
        best.append(cosine.amax(1))
    nearest = torch.cat(best)
    return nearest.mean().item(), nearest.max().item()
