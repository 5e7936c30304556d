"""The subjects: small classifiers that the SAEs of the MNIST notebooks explain.

A model here is an `nn.Module` from pixels `(n, 784)` in [0, 1] to logits. Every named
sub-module is a hook point: for an `MLP`, "fc1" is the first hidden layer AFTER its
ReLU, "fc1.linear" the pre-activation, "head" the logits. A `CNN` has "conv1" and
"conv2" before "fc1", whose outputs are maps (n, channels, height, width). An
`EdgeMLP` is an MLP behind fixed edge filters, "edges".
"""

import difflib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from tqdm.auto import trange

from saeutils.architectures import CNN, MLP, SIDE, EdgeMLP
from saeutils.datasets import ImageData

__all__ = [
    "CNN",
    "MLP",
    "SIDE",
    "EdgeMLP",
    "Evaluation",
    "Step",
    "activations_at",
    "evaluate",
    "evaluation_mode",
    "hook_point",
    "labelled_batches",
    "train_classifier",
]

if TYPE_CHECKING:
    import pandas as pd


class Evaluation(NamedTuple):
    """How well a classifier does on a set."""

    accuracy: float
    """Share of rows whose largest logit is the label, in [0, 1]."""
    cross_entropy: float
    """Mean of −log softmax(logits)[label], in nats."""


def hook_point(model: nn.Module, name: str) -> nn.Module:
    """The sub-module called `name`; ValueError listing the valid names if none is.

    A transformer_lens model's names for its hooks (`hook_dict`) are valid, too.
    """
    modules = {k: m for k, m in model.named_modules() if k}
    modules |= getattr(model, "hook_dict", {})
    if name not in modules:
        near = difflib.get_close_matches(name, modules)
        raise ValueError(
            f"{type(model).__name__} has no hook point {name!r}"
            + (f" (did you mean {' or '.join(map(repr, near))}?)" if near else "")
            + f"; it has: {', '.join(modules) or 'none'}"
        )
    return modules[name]


def labelled_batches(
    data: ImageData | tuple[Tensor, Tensor], batch_size: int = 2048
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) in order, a batch at a time; images become pixels in [0, 1].

    Args:
        data: ImageData, or a pair (inputs, labels) for a model that takes other inputs.

    Raises:
        ValueError: no rows, labels of another length, NaN or Inf in the inputs.
    """
    pair = (data.images, data.labels) if isinstance(data, ImageData) else data
    inputs, labels = pair
    if len(inputs) != len(labels):
        raise ValueError(
            f"{len(inputs)} inputs but {len(labels)} labels: each input needs one label"
        )
    if len(inputs) == 0:
        raise ValueError("the data are empty: at least one labelled input is needed")
    for i in range(0, len(inputs), batch_size):
        x = inputs[i : i + batch_size]
        if isinstance(data, ImageData):
            x = _to_pixels(x)
        elif x.is_floating_point() and not x.isfinite().all():
            bad = (~x.isfinite()).flatten(1).any(1).nonzero()[0].item()
            raise ValueError(
                f"input {i + bad} contains NaN or Inf: remove or repair it first"
            )
        yield x, labels[i : i + batch_size]


def _to_pixels(images: UInt8[Tensor, "n h w"]) -> Float[Tensor, "n h*w"]:
    return images.flatten(1).float() / 255


@contextmanager
def evaluation_mode(model: nn.Module):
    """`model.eval()` and no gradients inside; each module's mode comes back after."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, training in modes.items():
            module.training = training


def evaluate(
    model: nn.Module,
    data: ImageData | tuple[Tensor, Tensor],
    *,
    batch_size: int = 2048,
) -> Evaluation:
    """Accuracy and cross-entropy of `model` on all of `data` (sums in float64).

    data: images, or a pair (inputs, labels); of a language model (tokens, next tokens),
        both (n, positions), where a label of −100 means that nothing is asked for.
    batch_size: labels in one go.
    """
    device = _device(model)
    if isinstance(data, tuple) and data[1].ndim == 2:
        batch_size = max(1, batch_size // data[1].shape[1])
    n, correct, nats = 0, 0, 0.0
    with evaluation_mode(model):
        for x, y in labelled_batches(data, batch_size):
            logits, y = model(x.to(device)), y.to(device)
            if y.ndim == 2:
                logits, y = logits[y != -100].float(), y[y != -100]
            correct += (logits.argmax(-1) == y).sum().item()
            nats += F.cross_entropy(logits, y, reduction="none").double().sum().item()
            n += len(y)
    return Evaluation(correct / n, nats / n)


def activations_at(
    model: nn.Module,
    hook: str,
    data: ImageData | tuple[Tensor, Tensor],
    *,
    batch_size: int = 2048,
) -> Float[Tensor, "n ..."]:
    """What `model` puts out at `hook` on all of `data`, in memory and in order.

    For sets that fit; `activations.save_activations` writes larger ones to disk.

    Raises: ValueError for an unknown hook or bad data.
    """
    hook_point(model, hook)
    device, out = _device(model), []
    with evaluation_mode(model), _listening(model, [hook]) as heard:
        for x, _ in labelled_batches(data, batch_size):
            model(x.to(device))
            out.append(heard[hook])
    return torch.cat(out)


class Step(NamedTuple):
    """One training step, as an extra term of the loss sees it, before the update."""

    index: Int64[Tensor, " b"]
    """Positions of its images in the training data."""
    pixels: Float[Tensor, "b pixels"]
    """What the model was given (shifted); the graph starts here, so gradients of
    whatever follows with respect to the pixels can be taken."""
    labels: Int64[Tensor, " b"]
    logits: Float[Tensor, "b classes"]
    acts: dict[str, Tensor]
    """Activations at the `hooks` asked for, by name."""


def train_classifier(
    model: nn.Module,
    data: ImageData,
    *,
    epochs: int = 8,
    batch_size: int = 256,
    lr: float = 4e-3,
    weight_decay: float = 0.3,
    shift: int = 0,
    seed: int = 0,
    test: ImageData | None = None,
    extra_loss: Callable[[Step], Tensor] | None = None,
    hooks: Sequence[str] = (),
    progress: bool = True,
) -> "pd.DataFrame":
    """Train in place with AdamW and a one-cycle learning rate on cross-entropy.

    Args:
        lr: the peak, reached after a fifth of the steps.
        weight_decay: AdamW's. 0.3 costs little accuracy and leaves hidden layers that
            use fewer directions than with 0.01, which sparse codes describe better.
        shift: each image is moved by up to this many pixels in x and in y, drawn
            anew each time it is seen (0 = never moved).
        seed: order and shifts come from this alone.
        test: evaluated after each epoch when given.
        extra_loss: from a `Step` to a number, weighted as you like, that is added to
            the cross-entropy; `saeutils.losses` has some.
        hooks: hook points whose activations `extra_loss` needs.

    Returns:
        One row an epoch: epoch, loss (mean over the epoch, nats; the sum of both
        terms), extra_loss (its part, when given), accuracy (running, on the images
        as trained on), test_accuracy and test_cross_entropy (when `test` is given),
        seconds (since the start).

    Raises:
        ValueError: bad data or numbers, or a loss that stopped being finite.
    """
    import pandas as pd

    _refuse_bad_training(model, data, epochs, batch_size, lr, shift)
    if hooks and extra_loss is None:
        raise ValueError(
            f"hooks {list(hooks)} are for an extra_loss, and none is given"
        )
    device, n = _device(model), len(data.labels)
    generator = torch.Generator().manual_seed(seed)
    labels, shifted = data.labels.to(device), _shifter(data.images.to(device), shift)
    steps = math.ceil(n / batch_size)
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps * epochs, pct_start=0.2, cycle_momentum=False
    )
    history, started = [], time.perf_counter()
    trained = [p for p in model.parameters() if p.requires_grad]
    bar = trange(epochs, desc="classifier", unit="epoch", disable=not progress)
    for epoch in bar:
        model.train()
        total, extra = torch.zeros(2, dtype=torch.float64, device=device)
        correct = torch.zeros((), dtype=torch.int64, device=device)
        for index in torch.randperm(n, generator=generator).split(batch_size):
            offset = torch.randint(2 * shift + 1, (2, len(index)), generator=generator)
            index = index.to(device)
            pixels = shifted(index, offset.to(device))
            with _listening(model, hooks) as acts:
                logits = model(pixels.requires_grad_(extra_loss is not None))
            loss = F.cross_entropy(logits, labels[index])
            if extra_loss is not None:
                term = extra_loss(Step(index, pixels, labels[index], logits, acts))
                if term.shape != ():
                    raise ValueError(
                        f"extra_loss gave shape {tuple(term.shape)}, expected a "
                        "number, as .mean() over the batch gives"
                    )
                loss = loss + term
                extra += term.detach().double() * len(index)
            optimiser.zero_grad()
            loss.backward(inputs=trained)
            optimiser.step()
            schedule.step()
            total += loss.detach().double() * len(index)
            correct += (logits.argmax(-1) == labels[index]).sum()
        row = {
            "epoch": epoch + 1,
            "loss": total.item() / n,
            "accuracy": correct.item() / n,
        }
        if extra_loss is not None:
            row["extra_loss"] = extra.item() / n
        if not math.isfinite(row["loss"]):
            raise ValueError(
                f"the loss is {row['loss']} in epoch {epoch + 1}: lower lr (now {lr})"
            )
        if test is not None:
            row["test_accuracy"], row["test_cross_entropy"] = evaluate(model, test)
        history.append(row | {"seconds": time.perf_counter() - started})
        bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if k != "epoch"})
    model.eval()
    return pd.DataFrame(history)


@contextmanager
def _listening(model: nn.Module, hooks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """A dictionary that fills with the outputs of these hook points in a pass."""
    heard: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: heard.update({name: output})

    handles = [hook_point(model, h).register_forward_hook(keep(h)) for h in hooks]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _refuse_bad_training(
    model: nn.Module,
    data: ImageData,
    epochs: int,
    batch_size: int,
    lr: float,
    shift: int,
) -> None:
    """Everything a user can get wrong, found before the first step."""
    for name, value, least in (
        ("epochs", epochs, 1),
        ("batch_size", batch_size, 1),
        ("shift", shift, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not lr > 0:
        raise ValueError(f"lr must be positive, got {lr}")
    pixels, _ = next(labelled_batches(data, 1))
    with evaluation_mode(model):
        n_classes = model(pixels.to(_device(model))).shape[-1]
    low, high = data.labels.min().item(), data.labels.max().item()
    if low < 0 or high >= n_classes:
        raise ValueError(
            f"labels run from {low} to {high}, but the model has {n_classes} classes: "
            f"they must lie in 0..{n_classes - 1}"
        )


def _shifter(
    images: UInt8[Tensor, "n h w"], shift: int
) -> Callable[[Int64[Tensor, " b"], Int64[Tensor, "2 b"]], Float[Tensor, "b pixels"]]:
    """A function (index, offset) -> pixels of those images moved by offset − shift.

    One gather from the padded images does the whole batch.
    """
    height, width = images.shape[1:]
    padded = F.pad(images, (shift,) * 4)
    stride = padded.shape[2]
    flat = padded.flatten(1)
    corner = torch.arange(height)[:, None] * stride + torch.arange(width)
    corner = corner.flatten().to(images.device)

    def shifted(
        index: Int64[Tensor, " b"], offset: Int64[Tensor, "2 b"]
    ) -> Float[Tensor, "b pixels"]:
        start = offset[0] * stride + offset[1]
        return flat[index].gather(1, corner + start[:, None]).float() / 255

    return shifted


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def story_model(name: str | Path = "story-2L", *, device: str = "cpu") -> nn.Module:
    """A story transformer, embedded, from a folder or the hub: see `story_models`."""
    from saeutils import story_models

    return story_models.story_model(name, device=device)
