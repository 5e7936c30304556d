"""What a model still does when the activations at one hook point are replaced."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from saeutils.datasets import ImageData
from saeutils.models import (
    Evaluation,
    evaluation_mode,
    hook_point,
    labelled_batches,
)
from saeutils.streaming import RunningMoments

Edit = Callable[[Tensor], Tensor]  # activations -> what stands in their place


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
    kl: float = math.nan
    """Mean KL(clean ‖ spliced) of what the model says, in nats; it sees changes that
    happen to leave the loss as it was."""

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


def in_model(
    model: nn.Module,
    hook: str,
    reconstruct: Edit,
    data: ImageData | tuple[Tensor, Tensor],
    *,
    where: Bool[Tensor, "n positions"] | None = None,
    batch_size: int = 2048,
) -> InModel:
    """Accuracy and cross-entropy of `model` with `reconstruct` spliced in at `hook`.

    Args:
        reconstruct: (n, d_in) activations -> (n, d_in). Activations with more axes
            (batch, position, d_in) are given to it as rows.
        data: images, or a pair (inputs, labels).
        where: positions to replace, e.g. `language.story_positions`; the others stay
            as they are, under ablation too, and do not count in the mean.

    Raises:
        ValueError: a hook point that the model has not (the valid ones are listed) or
            does not use, and a reconstruction of another shape.
    """
    how = dict(where=where, batch_size=batch_size)
    return in_models(model, hook, {"": reconstruct}, data, **how)[""]


@torch.no_grad()
def in_models(
    model: nn.Module,
    hook: str,
    reconstructions: Mapping[str, Edit],
    data: ImageData | tuple[Tensor, Tensor],
    *,
    where: Bool[Tensor, "n positions"] | None = None,
    batch_size: int = 2048,
) -> dict[str, InModel]:
    """`in_model` of several reconstructions; what they share is computed once."""
    mean = _mean_at(model, hook, _batches(model, data, where, batch_size))
    edits = {("spliced", n): _by_rows(hook, r) for n, r in reconstructions.items()}
    edits["ablated", "mean"] = lambda acts: mean.to(acts).expand_as(acts)
    edits["ablated", "zero"] = torch.zeros_like
    named = {key: {hook: edit} for key, edit in edits.items()} | {("clean", ""): {}}
    found = evaluate_edits(model, named, data, where=where, batch_size=batch_size)
    clean = found["clean", ""].evaluation
    ablated = [found["ablated", kind].evaluation for kind in ("mean", "zero")]
    return {
        name: InModel(hook, clean, outcome.evaluation, *ablated, outcome.kl)
        for (kind, name), outcome in found.items()
        if kind == "spliced"
    }


class Outcome(NamedTuple):
    """A model that was edited, on some data."""

    evaluation: Evaluation
    kl: float
    """Mean KL(unedited ‖ edited) of its predictions, in nats."""


@torch.no_grad()
def evaluate_edits(
    model: nn.Module,
    edits: Mapping[Any, Mapping[str, Edit]],
    data: ImageData | tuple[Tensor, Tensor],
    *,
    where: Bool[Tensor, "n positions"] | None = None,
    batch_size: int = 2048,
) -> dict[Any, Outcome]:
    """The model under several edits, each of one or more hook points at once.

    Args:
        edits: name -> {hook: edit}; {} is the model as it is.
        data, batch_size: as `models.evaluate` takes them.
        where: positions to edit (all): the others stay as they are.

    Memory: predictions of one batch, twice.
    """
    n = 0
    right = dict.fromkeys(edits, 0)
    nats, kl = (dict.fromkeys(edits, 0.0) for _ in range(2))
    with evaluation_mode(model):
        for x, y, part in _batches(model, data, where, batch_size):
            log_p, asked = _predictions(model, x, y)
            n += len(asked)
            for name, edit in edits.items():
                log_q = log_p
                if edit:
                    with ExitStack() as stack:
                        for hook, change in edit.items():
                            stack.enter_context(edited(model, hook, change, part))
                        log_q, _ = _predictions(model, x, y)
                right[name] += (log_q.argmax(-1) == asked).sum().item()
                missed = F.nll_loss(log_q, asked, reduction="none")
                nats[name] += missed.double().sum().item()
                apart = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
                kl[name] += apart.double().item()
    return {
        name: Outcome(Evaluation(right[name] / n, nats[name] / n), kl[name] / n)
        for name in edits
    }


def _predictions(
    model: nn.Module, x: Tensor, y: Tensor
) -> tuple[Float[Tensor, "asked classes"], Int64[Tensor, " asked"]]:
    """log p and label wherever something is asked for (label not −100)."""
    logits = model(x)
    if y.ndim == 2:
        logits, y = logits[y != -100].float(), y[y != -100]
    return logits.log_softmax(-1), y


def _mean_at(
    model: nn.Module,
    hook: str,
    batches: Iterable[tuple[Tensor, Tensor, Tensor | None]],
) -> Float[Tensor, " d"]:
    moments: RunningMoments | None = None

    def watch(acts: Tensor) -> Tensor:
        nonlocal moments
        rows = acts.flatten(0, -2)
        if moments is None:
            moments = RunningMoments(rows.shape[1], device=rows.device)
        if len(rows):
            moments.update(rows)
        return acts

    with evaluation_mode(model):
        for x, _, part in batches:
            with edited(model, hook, watch, part):
                model(x)
    if moments is None:
        raise ValueError(f"the model never calls {hook!r}, so nothing can change")
    return moments.mean


def _batches(
    model: nn.Module,
    data: ImageData | tuple[Tensor, Tensor],
    where: Bool[Tensor, "n positions"] | None,
    batch_size: int,
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Inputs, labels and `where` of each batch, on the model's device."""
    device = next(model.parameters()).device
    labels = data.labels if isinstance(data, ImageData) else data[1]
    if where is not None and where.shape != labels.shape:
        raise ValueError(
            f"where has shape {tuple(where.shape)}, the labels {tuple(labels.shape)}: "
            "it says of every position whether it is replaced"
        )
    if labels.ndim == 2:
        batch_size = max(1, batch_size // labels.shape[1])
    done = 0
    for x, y in labelled_batches(data, batch_size):
        part = None if where is None else where[done : done + len(x)].to(device)
        yield x.to(device), y.to(device), part
        done += len(x)


def _by_rows(hook: str, reconstruct: Edit) -> Edit:
    """The same of activations with any axes before the last one."""

    def splice(acts: Tensor) -> Tensor:
        rows = acts.flatten(0, -2)
        out = reconstruct(rows)
        if out.shape != rows.shape:
            raise ValueError(
                f"the activations at {hook!r} have shape {tuple(rows.shape)}, but the "
                f"reconstruction {tuple(out.shape)}: was it trained at another hook?"
            )
        return out.to(acts.dtype).reshape(acts.shape)

    return splice


@contextmanager
def edited(
    model: nn.Module,
    hook: str,
    edit: Edit,
    where: Bool[Tensor, "batch positions"] | None = None,
):
    """Inside, the output of `hook` is `edit(output)` (its first part, of a tuple).

    where: positions (of the next batch) to edit: `edit` sees these alone, as rows.
    """

    def change(acts: Tensor) -> Tensor:
        if where is None:
            return edit(acts)
        acts = acts.clone()
        acts[where] = edit(acts[where])
        return acts

    def replace(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (change(output[0]), *output[1:])
        return change(output)

    handle = hook_point(model, hook).register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()
