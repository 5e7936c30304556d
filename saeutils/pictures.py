"""What real images are like, and how far a picture is from that."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from saeutils.datasets import ImageData
from saeutils.models import labelled_batches
from saeutils.streaming import RunningMoments

HIGH = 0.25  # cycles a pixel: half of the highest frequency there is


@dataclass(frozen=True, eq=False)
class ImageStats:
    """What real images are like: mean, principal components, spectrum."""

    data: ImageData
    shape: tuple[int, int]
    mean: Float[Tensor, " pixels"]
    axes: Float[Tensor, "components pixels"]
    """Principal components, largest variance first."""
    sd: Float[Tensor, " components"]
    """Standard deviation along each."""
    amplitude: Float[Tensor, "h w2"]
    """Mean |rfft2| of the images."""

    def coordinates(
        self, images: Float[Tensor, "n pixels"]
    ) -> Float[Tensor, "n components"]:
        """Principal coordinates in standard deviations: 1 on average in real images."""
        return (images - self.mean) @ self.axes.T / self.sd


def image_stats(data: ImageData, components: int = 150) -> ImageStats:
    """Mean, the largest principal components (at most so many), mean spectrum."""
    h, w = data.images.shape[1:]
    if components < 1:
        raise ValueError(f"components must be at least 1, got {components}")
    moments = RunningMoments(h * w, covariance=True)
    amplitude = torch.zeros(h, w // 2 + 1, dtype=torch.float64)
    for x, _ in labelled_batches(data):
        moments.update(x)
        amplitude += torch.fft.rfft2(x.view(-1, h, w)).abs().double().sum(0)
    variance, vectors = torch.linalg.eigh(moments.scatter / moments.n)
    variance, vectors = variance.flip(0)[:components], vectors.flip(1)[:, :components]
    useful = variance > 1e-9 * variance[0]
    return ImageStats(
        data,
        (h, w),
        moments.mean.float(),
        vectors.T[useful].float().contiguous(),
        variance[useful].sqrt().float(),
        (amplitude / len(data)).float(),
    )


@torch.no_grad()
def nearest_cosine(
    images: Float[Tensor, "n pixels"],
    data: ImageData,
    *,
    without: Int64[Tensor, " n"] | None = None,
) -> Float[Tensor, " n"]:
    """Cosine of each image with the nearest real one, none of them centred."""
    unit = F.normalize(images, dim=1)
    best, at = torch.full((len(images),), -1.0), 0
    for x, _ in labelled_batches(data):
        cosine = unit @ F.normalize(x, dim=1).T
        if without is not None:
            cosine[without[:, None] == data.ids[at : at + len(x)]] = -1
        best, at = torch.maximum(best, cosine.amax(1)), at + len(x)
    return best


def high_frequency(
    images: Float[Tensor, "n pixels"], shape: tuple[int, int], above: float = HIGH
) -> Float[Tensor, " n"]:
    """Share of the power at more than `above` cycles a pixel, without the mean."""
    h, w = shape
    power = torch.fft.fft2(images.view(-1, h, w)).abs().square()
    frequency = torch.hypot(
        *torch.meshgrid(torch.fft.fftfreq(h), torch.fft.fftfreq(w), indexing="ij")
    )
    power = power * (frequency > 0)
    total = power.sum((1, 2)).clamp(min=1e-20)
    return (power * (frequency > above)).sum((1, 2)) / total


def stability(images: Float[Tensor, "units seeds pixels"]) -> tuple[float, float]:
    """(mean cosine of images of one unit from different seeds, and of images of
    different units): the first means something as far as it exceeds the second."""
    units, seeds, _ = images.shape
    unit = F.normalize(images, dim=2)
    total = unit.sum((0, 1)).square().sum()
    own = unit.sum(1).square().sum()
    n = units * seeds
    same = (own - n) / max(n * (seeds - 1), 1)
    other = (total - own) / max(n * (n - seeds), 1)
    nan = math.nan
    return (same.item() if seeds > 1 else nan), (other.item() if units > 1 else nan)


def displayable(images: Float[Tensor, "*n pixels"]) -> Float[Tensor, "*n pixels"]:
    """Images to draw: as they are if in [0, 1], else around mid-grey, which is zero."""
    inside = (images.amin(-1, keepdim=True) >= 0) & (images.amax(-1, keepdim=True) <= 1)
    largest = images.abs().amax(-1, keepdim=True).clamp(min=1e-9)
    return torch.where(inside, images, 0.5 + 0.5 * images / largest)
