"""SynthSAEBench-16k, rebuilt offline from its published configuration.

16,384 features in 768 dimensions, about 34 on a row: Zipf rates, trees of exclusive
children, a copula of rank 25, directions pushed apart a little. The published weights
are not needed: the configuration and a seed make a model of the same distribution,
though not the same draw. Sampling is sae_lens' own, since "the same" is the point.
Source: Chanin et al. (2026), arXiv 2602.14687, and sae_lens' documentation.
"""

import contextlib
import os
from typing import Any

import torch
from torch import Tensor

from saeutils.firing import Independent
from saeutils.synthetic import Sample, Synthetic, SyntheticConfig, keyed_generator

#: of each trainer at L0 25, width 4,096: F1, MCC, uniqueness, R²
PUBLISHED = {
    "matryoshka": (0.879, 0.793, 0.999, 0.779),
    "batchtopk": (0.732, 0.757, 0.984, 0.792),
}


class SynthBench(Synthetic):
    """The benchmark's model behind the interface of `Synthetic`.

    Args:
        scale: of the number of features, roots and dimensions; 1 is the published
            size, 1/16 has 1,024 features in 48 dimensions.
        orthogonal_steps: of pushing directions apart (published: 100).

    `rates` are measured on `rate_rows` rows: the trees make features fire more rarely
    than their base probabilities say (59 in sum, against the published L0 of 34). `law`
    knows these rates alone: the self-check holds pairs to independence, which the
    benchmark's are not meant to keep.
    """

    def __init__(
        self,
        scale: int | float = 1,
        *,
        seed: int = 0,
        device: str = "cpu",
        orthogonal_steps: int = 100,
        rate_rows: int = 10_000,
    ) -> None:
        n, d = round(16_384 * scale), round(768 * scale)
        self.config = SyntheticConfig(n=n, d=d, l0=min(34, n / 20), seed=seed)
        self.device = device
        config = configuration(n, d, max(1, round(128 * scale)), seed, orthogonal_steps)
        from sae_lens.synthetic import SyntheticModel

        with (
            open(os.devnull, "w") as null,
            contextlib.redirect_stderr(null),
            torch.enable_grad(),  # pushing directions apart descends a gradient
        ):
            self.model = SyntheticModel(config, device=device)
        generator = self.model.activation_generator
        generator.modify_activations = None
        self._hierarchy = self.model.hierarchy.modifier
        self.W = self.model.feature_dict.feature_vectors.detach()
        self.b = self.model.feature_dict.bias.detach()
        self.law, self.noise = Independent(torch.ones(n, device=device)), 0.0
        counts, drawn = torch.zeros(n, device=device), 0
        for _, acts in self._blocks(rate_rows, -2, 0):
            counts += (acts > 0).sum(0)
            drawn += len(acts)
        self.law = Independent(counts.clamp_min(0.5) / drawn)

    def _block(self, number: int, seed: int) -> Sample:
        words = keyed_generator("cpu", self.config.seed, seed, number).initial_seed()
        devices = [self.device] if self.device != "cpu" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(words % 2**63)
            acts: Tensor = self.model.activation_generator.sample(self.block)
            acts = self._hierarchy(acts).relu()
        return Sample(acts @ self.W + self.b, acts)


def configuration(
    n: int, d: int, roots: int, seed: int, orthogonal_steps: int = 100
) -> Any:
    """sae_lens' configuration, published values but for the sizes."""
    from sae_lens import synthetic as s

    return s.SyntheticModelConfig(
        num_features=n,
        hidden_dim=d,
        firing_probability=s.ZipfianFiringProbabilityConfig(0.5, 0.4, 5e-4),
        hierarchy=s.HierarchyConfig(
            total_root_nodes=roots,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            compensate_probabilities=True,
        ),
        orthogonalization=_orthogonal(s, orthogonal_steps),
        correlation=s.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=s.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=s.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        seed=seed,
    )


def _orthogonal(s: Any, steps: int) -> Any:
    from sae_lens.synthetic.synthetic_model import OrthogonalizationConfig

    return OrthogonalizationConfig(num_steps=steps, lr=3e-4) if steps else None
