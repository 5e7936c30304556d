"""What a unit asks for, as an image: ascent in PIXEL space through the whole model.

    x* = argmax_x  a_t(x) / m_t  −  off · Σ_{j≠t} relu(a_j(x) − θ_j) / m_j  −  R(x)

a_t is the pre-activation of unit t (a neuron, a latent, a meta-latent), m_t its
maximum over real images. What is found depends on R and on how x is written: as
pixels, as Fourier coefficients, as phases, or in principal coordinates of the data.
All images (units × seeds) are one batch. None of this says anything without the
measures of `measure`: unconstrained ascent reaches any activation with noise.

Sources: Erhan et al. (2009); Mahendran and Vedaldi (2015, total variation, inversion);
Olah et al. (2017, jitter, Fourier basis); Fel et al. (2023, phases of a fixed
spectrum); Nguyen et al. (2016, a prior over images).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from saeutils.canvas import Method, looked_at, payment, written
from saeutils.pictures import ImageStats, high_frequency, nearest_cosine, stability
from saeutils.readouts import Readout, Strongest, run

if TYPE_CHECKING:
    import pandas as pd

#: Ways to maximise, from nothing to the best prior here (weights: tried on MNIST).
METHODS = {
    "unconstrained": Method(box=False),
    "clamped": Method(),
    "L2": Method(l2=4.0),
    "total variation": Method(tv=4.0),
    "jitter + blur": Method(jitter=1, blur=1.0),
    "Fourier 1/f": Method("fourier"),
    "spectrum phases": Method("phase"),
    "PCA + prior": Method("pca", prior=1.2),
    "PCA + prior, alone": Method("pca", prior=1.2, off_target=0.03),
}

#: Ways to invert.
REBUILDING = {
    "clamped": Method(),
    "total variation": Method(tv=4.0),
    "PCA + prior": Method("pca", prior=1.0, lr=0.1),
}


class Maximised(NamedTuple):
    """What ascent found. Rows run over units first, then over seeds."""

    images: Float[Tensor, "units seeds pixels"]
    units: Int64[Tensor, " units"]
    score: Float[Tensor, "units seeds"]
    """What was maximised, without the terms of `Method`."""


def maximise(
    readout: Readout,
    units: Sequence[int] | Int64[Tensor, " units"],
    maxima: Float[Tensor, " units_of_readout"],
    stats: ImageStats,
    method: Method,
    *,
    seeds: int = 3,
    seed: int = 0,
) -> Maximised:
    """Images that excite each of `units` most, from `seeds` starts each, in one batch.

    Args:
        maxima: of each unit of the readout, its largest activation on real images
            (`readouts.strongest`). Units that never fire have no scale and no gradient
            worth following: they are refused.

    Raises:
        ValueError: a unit whose maximum is not positive, or none at all.
    """
    units = torch.as_tensor(units, dtype=torch.int64)
    if not len(units) or not bool((maxima[units] > 0).all()):
        dead = units[~(maxima[units] > 0)].tolist()
        raise ValueError(
            f"units {dead} never fire on the data: a picture of them would show "
            "nothing; choose where maxima > 0"
            if dead
            else "no units to maximise"
        )
    target = units.repeat_interleave(seeds)
    scale = maxima.clamp(min=1e-6)
    fires = maxima > 0

    def objective(images: Tensor) -> tuple[Tensor, Tensor]:
        pre, _ = readout(images)
        own = pre.gather(1, target[:, None])[:, 0]
        score = own / scale[target]
        if not method.off_target:
            return score, score
        others = ((pre - readout.threshold).relu() / scale * fires).sum(1)
        others = others - (own - readout.threshold[target]).relu() / scale[target]
        return score, score - method.off_target * others

    images, score = _ascend(objective, len(target), stats, method, seed)
    shape = len(units), seeds
    return Maximised(images.view(*shape, -1), units, score.view(shape))


def invert(
    model: nn.Module,
    hook: str,
    acts: Float[Tensor, "n d_in"],
    stats: ImageStats,
    method: Method,
    *,
    strength: int | float = 100,
    seed: int = 0,
) -> Float[Tensor, "n pixels"]:
    """Images whose activations are `acts`: of a layer, or decoded from a code.

        x* = argmin_x  strength · ‖a(x) − a‖² / ‖a‖² + R(x)

    For a code z of an SAE give sae.decode(z).
    """
    norm = acts.square().sum(1).clamp(min=1e-12)

    def objective(images: Tensor) -> tuple[Tensor, Tensor]:
        found, _ = run(model, hook, images)
        score = -(found - acts).square().sum(1) / norm
        return score, strength * score

    return _ascend(objective, len(acts), stats, method, seed)[0]


def _ascend(
    objective: Callable[[Tensor], tuple[Tensor, Tensor]],
    n: int,
    stats: ImageStats,
    method: Method,
    seed: int,
) -> tuple[Float[Tensor, "n pixels"], Float[Tensor, " n"]]:
    """Each image climbs on its own: the loss is a sum, and no optimiser mixes them."""
    generator = torch.Generator().manual_seed(seed)
    p, render = written(n, stats, method, generator)
    p.requires_grad_()
    momentum = 0.9 if method.optimiser == "sgd" else 0.0
    optimiser = {
        "adam": lambda: torch.optim.Adam([p], lr=method.lr),
        "rmsprop": lambda: torch.optim.RMSprop([p], lr=method.lr),
    }.get(
        method.optimiser,
        lambda: torch.optim.SGD([p], lr=method.lr, momentum=momentum),
    )()
    with torch.enable_grad():
        for _ in range(method.steps):
            images = render(p)
            _, gain = objective(looked_at(images, stats.shape, method, generator))
            loss = (payment(images, stats, method) - gain).sum()
            (p.grad,) = torch.autograd.grad(loss, p)
            if method.optimiser == "sgd":
                p.grad /= p.grad.norm(dim=1, keepdim=True).clamp(min=1e-12)
                p.grad *= p.shape[1] ** 0.5
            elif method.optimiser == "sign":
                p.grad.sign_()
            optimiser.step()
            if method.box and method.space == "pixels":
                with torch.no_grad():
                    p.clamp_(0, 1)
    with torch.no_grad():
        images = render(p)
        if method.box:
            images = images.clamp(0, 1)
        return images, objective(images)[0]


# --- measures ---------------------------------------------------------------


class Measures(NamedTuple):
    """Of one batch of images, one number an image."""

    ratio: Float[Tensor, " n"]
    """Activation of its unit over that unit's maximum on real images."""
    neighbour: Float[Tensor, " n"]
    """Cosine in pixels with the nearest real image."""
    high_frequency: Float[Tensor, " n"]
    """Share of its power (without the mean) above half of the highest frequency."""
    answer: Int64[Tensor, " n"]
    """Class that the model gives it."""
    active: Int64[Tensor, " n"]
    """How many units of the readout fire on it."""


@torch.no_grad()
def measure(
    images: Float[Tensor, "n pixels"],
    units: Int64[Tensor, " n"],
    readout: Readout,
    maxima: Float[Tensor, " units_of_readout"],
    stats: ImageStats,
    *,
    without: Int64[Tensor, " n"] | None = None,
) -> Measures:
    """All measures of images made for `units`.

    Args:
        without: ids of real images that do not count as a neighbour: for real images,
            themselves.
    """
    pre, logits = readout(images)
    own = pre.gather(1, units[:, None])[:, 0]
    return Measures(
        ratio=own / maxima[units],
        neighbour=nearest_cosine(images, stats.data, without=without),
        high_frequency=high_frequency(images, stats.shape),
        answer=logits.argmax(1),
        active=(pre > readout.threshold).sum(1),
    )


REAL = "best real image"


def compare(
    readout: Readout,
    units: Int64[Tensor, " units"],
    known: Strongest,
    stats: ImageStats,
    methods: Mapping[str, Method],
    *,
    seeds: int = 3,
) -> tuple["pd.DataFrame", dict[str, Float[Tensor, "units _ pixels"]]]:
    """The table of all methods on the same units, and their images by method.

    The first row, and the first images, are each unit's strongest real image. Columns,
    means over units and seeds: name, × data's maximum (the median), nearest real image
    (cosine), high frequency share, class agreement (share of the images that the model
    calls what most of the unit's strongest images are), units active, same unit
    (cosine of its images from different starts), other units (of different units).

    Args:
        known: `strongest(readout, stats.data)`.
    """
    import pandas as pd

    data, classes = stats.data, known.majority(stats.data.labels)[units]
    images = {REAL: data.take(known.index[units, 0]).pixels[:, None]}
    for name, method in methods.items():
        images[name] = maximise(
            readout, units, known.maxima, stats, method, seeds=seeds
        ).images
    rows = []
    for name, found in images.items():
        each = found.shape[1]
        own = data.ids[known.index[units, 0]] if name == REAL else None
        of = measure(
            found.flatten(0, 1),
            units.repeat_interleave(each),
            readout,
            known.maxima,
            stats,
            without=own,
        )
        same, other = stability(found)
        agrees = of.answer == classes.repeat_interleave(each)
        rows.append(
            {
                "name": name,
                "× data's maximum": of.ratio.median().item(),
                "nearest real image": of.neighbour.mean().item(),
                "high frequency share": of.high_frequency.mean().item(),
                "class agreement": agrees.float().mean().item(),
                "units active": of.active.float().mean().item(),
                "same unit": same,
                "other units": other,
            }
        )
    return pd.DataFrame(rows), images


def rebuild(
    model: nn.Module,
    x: Float[Tensor, "n pixels"],
    targets: Mapping[str, tuple[str, Float[Tensor, "n _"]]],
    stats: ImageStats,
    methods: Mapping[str, Method],
) -> tuple["pd.DataFrame", dict[str, Float[Tensor, "n methods pixels"]]]:
    """Images from activations: mean pixel cosine with x (methods down, targets
    across), and the images by target.

    Args:
        targets: by name, the hook and what the activations there should be.
    """
    import pandas as pd

    images = {
        name: torch.stack(
            [invert(model, hook, acts, stats, m) for m in methods.values()], 1
        )
        for name, (hook, acts) in targets.items()
    }
    cosines = {
        name: F.cosine_similarity(found, x[:, None], dim=2).mean(0).tolist()
        for name, found in images.items()
    }
    return pd.DataFrame(cosines, index=list(methods)), images
