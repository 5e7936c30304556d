"""How an image is written while it climbs (`inversion`), and what it pays."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from saeutils.pictures import ImageStats

SPACES = ("pixels", "fourier", "phase", "pca")
OPTIMISERS = ("adam", "rmsprop", "sgd", "sign")


@dataclass(frozen=True)
class Method:
    """How an image is written and what it pays. Weights multiply means over pixels.

    Raises: ValueError for an unknown space or optimiser, or numbers out of range.
    """

    space: str = "pixels"
    """pixels: x = p. fourier: x = sigmoid(irfft2(p / f)). phase: the mean spectrum of
    the data with free phases. pca: x = mean + Σ_i p_i sd_i axis_i."""
    box: bool = True
    """Pixels stay in [0, 1]: clipped after each step (pixels), paid for and clipped at
    the end (pca, phase); a sigmoid does it in fourier."""
    l2: int | float = 0.0
    """Weight of mean x²."""
    tv: int | float = 0.0
    """Weight of total variation: mean |difference| of neighbours."""
    jitter: int = 0
    """Each step looks at the image moved by up to so many pixels."""
    blur: int | float = 0.0
    """Each step looks at the image blurred by a Gaussian of so many pixels."""
    prior: int | float = 0.0
    """Weight of the mean squared principal coordinate: 1 for real images."""
    off_target: int | float = 0.0
    """Weight of the other units' activations, each in its own maxima."""
    steps: int = 200
    lr: int | float = 0.05
    optimiser: str = "adam"
    """adam, rmsprop; sgd: momentum 0.9 on the gradient at length 1 an image; sign."""

    def __post_init__(self) -> None:
        for name, allowed in (("space", SPACES), ("optimiser", OPTIMISERS)):
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} is one of {allowed}, got {value!r}")
        for name in ("l2", "tv", "jitter", "blur", "prior", "off_target"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if self.steps < 1 or not self.lr > 0:
            raise ValueError(f"needs steps ≥ 1 and lr > 0, got {self.steps}, {self.lr}")


def written(
    n: int, stats: ImageStats, method: Method, generator: torch.Generator
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Start parameters (n, …) and the function that makes images of them."""
    h, w = stats.shape
    if method.space == "pixels":
        start = 0.1 * torch.rand(n, h * w, generator=generator)
        return start, lambda p: p
    if method.space == "pca":
        start = 0.3 * torch.randn(n, len(stats.sd), generator=generator)
        return start, lambda p: stats.mean + (p * stats.sd) @ stats.axes
    if method.space == "phase":
        start = math.pi * (2 * torch.rand(n, h * w, generator=generator) - 1)

        def of_phases(p: Tensor) -> Tensor:
            angle = torch.fft.rfft2(p.view(n, h, w))
            unit = angle / angle.abs().clamp(min=1e-9)
            return torch.fft.irfft2(stats.amplitude * unit, s=(h, w)).flatten(1)

        return start, of_phases
    frequency = torch.hypot(
        *torch.meshgrid(torch.fft.fftfreq(h), torch.fft.rfftfreq(w), indexing="ij")
    )
    falls = 1 / frequency.clamp(min=1 / max(h, w))
    start = 0.1 * torch.randn(n, h * w, generator=generator)
    base = torch.logit(stats.mean.mean())  # sigmoid of this: as much ink as real images

    def of_frequencies(p: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(p.view(n, h, w)) * falls
        return (torch.fft.irfft2(spectrum, s=(h, w)).flatten(1) + base).sigmoid()

    return start, of_frequencies


def looked_at(
    images: Tensor, shape: tuple[int, int], method: Method, generator: torch.Generator
) -> Tensor:
    """The image as the model sees it in this step: moved, blurred."""
    x = images.view(-1, *shape)
    if method.jitter:
        by = torch.randint(
            -method.jitter, method.jitter + 1, (2,), generator=generator
        ).tolist()
        x = x.roll(by, (1, 2))
    if method.blur:
        reach = math.ceil(2 * method.blur)
        at = torch.arange(-reach, reach + 1)
        kernel = torch.exp(-(at**2) / (2 * method.blur**2))
        kernel = kernel / kernel.sum()
        x = F.conv2d(x[:, None], kernel.view(1, 1, -1, 1), padding=(reach, 0))
        x = F.conv2d(x, kernel.view(1, 1, 1, -1), padding=(0, reach))[:, 0]
    return x.flatten(1)


def payment(images: Tensor, stats: ImageStats, method: Method) -> Tensor:
    """R(x), one number an image."""
    total = images.new_zeros(len(images))
    if method.l2:
        total = total + method.l2 * images.square().mean(1)
    if method.tv:
        x = images.view(-1, *stats.shape)
        across, down = x.diff(dim=2).abs(), x.diff(dim=1).abs()
        total = total + method.tv * (across.mean((1, 2)) + down.mean((1, 2)))
    if method.prior:
        coordinates = stats.coordinates(images)
        total = total + method.prior * coordinates.square().mean(1)
    if method.box and method.space in ("pca", "phase"):
        outside = (images - 1).relu().square() + (-images).relu().square()
        total = total + 10 * outside.mean(1)
    return total
