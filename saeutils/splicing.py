"""What a model still does when the activations at one hook point are replaced."""

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from saeutils.datasets import ImageData
from saeutils.models import Evaluation, evaluate, evaluation_mode, hook_point
from saeutils.streaming import RunningMoments


class Recovered(NamedTuple):
    """1 − (spliced − clean) / (ablated − clean), with what it was divided by."""

    share: float
    """1 = as good as clean, 0 = as bad as ablated, NaN = denominator too small."""
    denominator: float
    """ablated − clean: how much there was to lose (nats, or share of accuracy)."""


class InModel(NamedTuple):
    """The model on the same data with four versions of the activations at `hook`."""

    hook: str
    clean: Evaluation
    """Untouched."""
    spliced: Evaluation
    """Replaced by their reconstruction."""
    mean_ablated: Evaluation
    """Replaced by their mean over the data."""
    zero_ablated: Evaluation
    """Replaced by zero."""

    @property
    def delta_accuracy(self) -> float:
        """Accuracy spliced − clean, in [−1, 1]; negative when something was lost."""
        return self.spliced.accuracy - self.clean.accuracy

    @property
    def delta_cross_entropy(self) -> float:
        """Cross-entropy spliced − clean, in nats; positive when something was lost."""
        return self.spliced.cross_entropy - self.clean.cross_entropy

    def recovered(
        self, against: str = "mean", measure: str = "cross_entropy", least: float = 0.01
    ) -> Recovered:
        """How much of what the ablation destroys the reconstruction keeps.

        Args:
            against: "mean" or "zero" ablation; measure: "cross_entropy" or "accuracy".
            least: a denominator below this (0.01 nats, or 1 point of accuracy) makes
                the share NaN: the layer hardly matters, so anything "recovers" it.
        """
        if against not in ("mean", "zero"):
            raise ValueError(f'against must be "mean" or "zero", got {against!r}')
        sign = {"cross_entropy": 1, "accuracy": -1}[measure]
        clean, spliced, ablated = (
            sign * getattr(e, measure)
            for e in (self.clean, self.spliced, getattr(self, f"{against}_ablated"))
        )
        denominator = ablated - clean
        if denominator < least:
            return Recovered(math.nan, denominator)
        return Recovered(1 - (spliced - clean) / denominator, denominator)


@torch.no_grad()
def in_model(
    model: nn.Module,
    hook: str,
    reconstruct: Callable[[Tensor], Tensor],
    data: ImageData | tuple[Tensor, Tensor],
    *,
    batch_size: int = 2048,
) -> InModel:
    """Accuracy and cross-entropy of `model` with `reconstruct` spliced in at `hook`.

    Args:
        reconstruct: (n, d_in) activations -> (n, d_in). Activations with more axes
            (batch, position, d_in) are given to it as rows.
        data: images, or a pair (inputs, labels).

    Raises:
        ValueError: a hook point that the model has not (the valid ones are listed) or
            does not use, and a reconstruction of another shape.
    """
    moments: RunningMoments | None = None

    def watch(acts: Tensor) -> Tensor:
        nonlocal moments
        rows = acts.flatten(0, -2)
        if moments is None:
            moments = RunningMoments(rows.shape[1], device=rows.device)
        moments.update(rows)
        return acts

    def splice(acts: Tensor) -> Tensor:
        rows = acts.flatten(0, -2)
        out = reconstruct(rows)
        if out.shape != rows.shape:
            raise ValueError(
                f"the activations at {hook!r} have shape {tuple(rows.shape)}, but the "
                f"reconstruction {tuple(out.shape)}: was it trained at another hook?"
            )
        return out.to(acts.dtype).reshape(acts.shape)

    with evaluation_mode(model):
        with edited(model, hook, watch):
            clean = evaluate(model, data, batch_size=batch_size)
        if moments is None:
            raise ValueError(f"the model never calls {hook!r}, so nothing can change")
        mean = moments.mean
        results = []
        for edit in (splice, lambda a: mean.to(a).expand_as(a), torch.zeros_like):
            with edited(model, hook, edit):
                results.append(evaluate(model, data, batch_size=batch_size))
    return InModel(hook, clean, *results)


@contextmanager
def edited(model: nn.Module, hook: str, edit: Callable[[Tensor], Tensor]):
    """Inside, the output of `hook` is `edit(output)` (its first part, of a tuple)."""

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    handle = hook_point(model, hook).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
