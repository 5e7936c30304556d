"""Unit vectors in a geometry asked for: random, pushed apart, or in clusters."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def directions(config: Any, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Directions of a `SyntheticConfig`: n, d, geometry, cluster, cluster_cosine."""
    n, d = config.n, config.d
    W = torch.randn(n, d, generator=generator)
    if config.geometry == "clustered":
        count = n // config.cluster
        centres = torch.randn(count, d, generator=generator)
        # Any feature may be in any cluster, whatever its rate.
        member = torch.randperm(n, generator=generator) % count
        c = config.cluster_cosine
        W = c**0.5 * _unit(centres)[member] + (1 - c) ** 0.5 * _unit(W)
    if config.geometry == "orthogonal":
        return torch.linalg.qr(W.T)[0].T.contiguous() if n <= d else spread_out(W)
    return _unit(W)


def spread_out(
    W: Float[Tensor, "n d"], steps: int = 100, length: float = 0.1
) -> Float[Tensor, "n d"]:
    """Unit rows pushed apart: descends Σ_{i≠j} (W_i · W_j)⁴ along the sphere.

    Steps are `length` long at first, and shrink to none. The fourth power, not the
    second, whose minima (tight frames) keep close pairs. 1,024 × n cosines at a time.
    """
    W = _unit(W)
    for step in range(steps):
        cubes = ((rows @ W.T).pow(3) @ W - rows for rows in W.split(1024))
        pull = torch.cat(list(cubes))
        W = _unit(W - length * (1 - step / steps) * pull / pull.norm(dim=1).mean())
    return W


def _unit(W: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W, dim=1)
