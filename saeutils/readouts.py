"""Units of a model as functions of its input: neurons, latents, directions.

A latent is read before its activation function, whose gradient is zero wherever the
latent is silent: that is how dead and silent units come to be drawn as grey fuzz.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from saeutils.datasets import ImageData
from saeutils.models import hook_point, labelled_batches


@dataclass(frozen=True, eq=False)
class Readout:
    """Units that are linear in the activations at a hook: pre = a · W + b.

    Neurons, latents of an SAE (before its activation function, whose gradient is zero
    where a latent is silent) and directions are such units: see `neurons`, `latents`
    and `directions`.
    """

    model: nn.Module
    hook: str
    W: Float[Tensor, "d_in units"] | None
    """None: the activations themselves."""
    b: Float[Tensor, " units"]
    threshold: Float[Tensor, " units"]
    """Above it a unit fires."""
    kind: str = "unit"

    def __call__(
        self, images: Float[Tensor, "n pixels"]
    ) -> tuple[Float[Tensor, "n units"], Float[Tensor, "n classes"]]:
        """(pre-activations, logits); gradients flow to the images."""
        acts, logits = run(self.model, self.hook, images)
        return (acts if self.W is None else acts @ self.W) + self.b, logits


def run(
    model: nn.Module,
    hook: str,
    images: Float[Tensor, "n pixels"],
    *,
    add: Float[Tensor, "n d_in"] | None = None,
) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n classes"]]:
    """(activations at `hook`, logits), with gradients.

    Args:
        add: what to add to the activations before the model goes on with them.

    Raises:
        ValueError: a hook point that the model has not, or never calls.
    """
    seen = []

    def look(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor | None:
        seen.append(output)
        return None if add is None else output + add.view_as(output)

    handle = hook_point(model, hook).register_forward_hook(look)
    try:
        logits = model(images)
    finally:
        handle.remove()
    if not seen:
        raise ValueError(f"the model never calls {hook!r}")
    return seen[0].flatten(1), logits


def neurons(model: nn.Module, hook: str, d: int) -> Readout:
    """The d neurons of a layer; name its PRE-activation, e.g. "fc1.linear"."""
    return Readout(model, hook, None, torch.zeros(d), torch.zeros(d), f"{hook} neuron")


def latents(model: nn.Module, hook: str, sae: Any) -> Readout:
    """The latents of a sae_lens SAE (not Gated, whose latents are no linear units)."""
    if not hasattr(sae, "b_enc"):
        raise ValueError(
            f"{type(sae).__name__} has no b_enc: a Gated SAE's latents are a product "
            "of two encoders; use directions(model, hook, sae.W_dec, sae.b_dec)"
        )
    W, b = sae.W_enc.detach(), sae.b_enc.detach()
    if getattr(sae.cfg, "apply_b_dec_to_input", True):
        b = b - sae.b_dec.detach() @ W
    threshold = getattr(sae, "threshold", torch.zeros_like(b)).detach()
    return Readout(model, hook, W, b, threshold, "latent")


def directions(
    model: nn.Module,
    hook: str,
    rows: Float[Tensor, "units d_in"],
    centre: Float[Tensor, " d_in"],
    kind: str = "direction",
) -> Readout:
    """Projections (a − centre) · row, rows scaled to length 1."""
    W = F.normalize(rows.detach(), dim=1).T.contiguous()
    b = -centre @ W
    return Readout(model, hook, W, b, torch.zeros_like(b), kind)


class Strongest(NamedTuple):
    """The images on which each unit is strongest, strongest first."""

    values: Float[Tensor, "units n"]
    index: Int64[Tensor, "units n"]
    """Position of each image in the data."""
    maxima: Float[Tensor, " units"]
    """Largest activation of each unit; 0 for a unit that never fires."""

    def majority(self, labels: Int64[Tensor, " m"]) -> Int64[Tensor, " units"]:
        """The label that most of a unit's strongest images have."""
        return labels[self.index].mode(1).values


@torch.no_grad()
def strongest(readout: Readout, data: ImageData, n: int = 10) -> Strongest:
    """The n strongest images of every unit, in one pass; the pre-activation counts."""
    if not 1 <= n <= len(data):
        raise ValueError(f"n must lie in 1..{len(data)} (images), got {n}")
    values = torch.empty(len(readout.b), 0)
    index, start = values.long(), 0
    for x, _ in labelled_batches(data):
        pre, _ = readout(x)
        values = torch.cat([values, pre.T], 1)
        here = torch.arange(start, start + len(x)).expand(len(values), -1)
        index = torch.cat([index, here], 1)
        values, kept = values.topk(min(n, values.shape[1]), dim=1)
        index, start = index.gather(1, kept), start + len(x)
    best = values[:, 0]
    maxima = torch.where(best > readout.threshold, best, 0.0).clamp(min=0)
    return Strongest(values, index, maxima)
