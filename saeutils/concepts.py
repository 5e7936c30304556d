"""Concepts computed from the pixels of an image alone, no labels: loops, strokes, ink.

And what the images that share one have in common, as a direction: `decoded_means`.
A picture is grey, 0 (paper) to 255 (ink); what is at least `threshold` counts as ink.
Ink is connected through corners too (8 neighbours), paper through sides only (4).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from saeutils.metrics import Autoencoder

Images = UInt8[Tensor, "n h w"]
THRESHOLD = 64  # higher breaks thin loops, lower fills small ones
#: name of a direction -> one step along it (down, right)
DIRECTIONS = {"horizontal": (0, 1), "vertical": (1, 0), "↘": (1, 1), "↙": (1, -1)}


def loops(
    images: Images, *, threshold: int = THRESHOLD, least: int = 2
) -> Int64[Tensor, " n"]:
    """Number of loops: pieces of paper that ink encloses.

    Args:
        least: pixels that a piece must have; smaller ones are gaps in a stroke.
    """
    from scipy import ndimage

    paper = np.pad(
        images.numpy() < threshold, ((0, 0), (1, 1), (1, 1)), constant_values=True
    )
    # One pass over the whole stack: pieces never join across images.
    cross = np.zeros((3, 3, 3), bool)
    cross[1] = [[0, 1, 0], [1, 1, 1], [0, 1, 0]]
    piece, n_pieces = ndimage.label(paper, cross)
    size = np.bincount(piece.ravel(), minlength=n_pieces + 1)
    size[0] = 0  # the ink
    size[piece[:, 0, 0]] = 0  # the paper around it
    owner = np.zeros(n_pieces + 1, np.int64)
    image, *_ = paper.nonzero()
    owner[piece[paper]] = image
    counts = np.bincount(owner[size >= least], minlength=len(paper))
    return torch.from_numpy(counts)


def euler_number(images: Images, *, threshold: int = THRESHOLD) -> Int64[Tensor, " n"]:
    """Pieces of ink minus holes in them (8-connected ink), by counting 2 × 2 windows.

        E = (Q1 − Q3 − 2 QD) / 4,   Q1, Q3: windows with one, three pixels of ink,
                                    QD: with two, across a corner

    A fast check on `loops`. Source: Gray 1971.
    """
    ink = torch.nn.functional.pad(images >= threshold, (1, 1, 1, 1)).int()
    a, b = ink[:, :-1, :-1], ink[:, :-1, 1:]
    c, d = ink[:, 1:, :-1], ink[:, 1:, 1:]
    n = a + b + c + d
    across = (n == 2) & (a == d)
    total = (n == 1).long() - (n == 3).long() - 2 * across.long()
    return total.sum((1, 2)) // 4


def longest_strokes(
    images: Images, *, threshold: int = THRESHOLD
) -> Int64[Tensor, "n 4"]:
    """Longest straight run of ink, in steps, along each of `DIRECTIONS`, in order.

    A diagonal step is √2 pixels long.
    """
    ink = images >= threshold
    _, h, w = ink.shape
    out = []
    for down, right in DIRECTIONS.values():
        run, length = ink, ink.flatten(1).any(1).long()
        while run.any():
            # where a run of one more ends: here, and a run of this length before
            moved = torch.zeros_like(run)
            moved[:, down:, max(right, 0) : w + min(right, 0)] = run[
                :, : h - down, max(-right, 0) : w - max(right, 0)
            ]
            run = moved & ink
            length += run.flatten(1).any(1)
        out.append(length)
    return torch.stack(out, 1)


def top_share(images: Images) -> Float[Tensor, " n"]:
    """Share of the ink (grey counted) in the upper half; NaN for an empty picture."""
    ink = images.double().sum(2)
    half = images.shape[1] // 2
    return (ink[:, :half].sum(1) / ink.sum(1)).float()


class Concepts(NamedTuple):
    """Yes-or-no properties of images."""

    names: list[str]
    member: Bool[Tensor, "n concepts"]


def _loops(images: Images) -> Concepts:
    n = loops(images)
    member = torch.stack([n == 0, n == 1, n >= 2], 1)
    return Concepts(["no loop", "one loop", "two loops or more"], member)


def _strokes(images: Images, least: int = 12) -> Concepts:
    pixels = longest_strokes(images) * torch.tensor([1, 1, 2**0.5, 2**0.5])
    member = pixels >= least
    return Concepts([f"{name} stroke" for name in DIRECTIONS], member)


def _halves(images: Images, margin: float = 0.03) -> Concepts:
    share = top_share(images)
    member = torch.stack([share > 0.5 + margin, share < 0.5 - margin], 1)
    return Concepts(["more ink on top", "more ink at the bottom"], member)


#: name of a set -> what makes it of images
CONCEPT_SETS: dict[str, Callable[[Images], Concepts]] = {
    "loops": _loops,
    "straight strokes": _strokes,
    "top or bottom ink": _halves,
}


def concept_set(name: str, images: Images) -> Concepts:
    """The yes-or-no concepts of one set, for each image.

        loops              none, one, two or more
        straight strokes   a run of ink 12 pixels long: horizontal, vertical, ↘, ↙
        top or bottom ink  more than 53 % of the ink in the upper, in the lower half

    Raises: ValueError for an unknown set.
    """
    if name not in CONCEPT_SETS:
        raise ValueError(f"concept set {name!r} is none of {', '.join(CONCEPT_SETS)}")
    return CONCEPT_SETS[name](images)


@torch.no_grad()
def decoded_means(
    sae: Autoencoder,
    rows: Float[Tensor, "n d_in"],
    member: Bool[Tensor, "m groups"],
    top: int,
    *,
    seed: int | None = None,
) -> Float[Tensor, "groups d_in"]:
    """decode(the `top` largest entries of the mean code of each group's rows).

    Args:
        member: which rows belong to which group (class or concept).
        top: entries of the mean code that are kept.
        seed: the control: these entries are moved to other latents, drawn at random
            for each group among those that fire on any row.

    Raises: ValueError for a group without rows, or top beyond the live latents.
    """
    if len(rows) != len(member):
        raise ValueError(f"{len(rows)} rows, but members given for {len(member)}")
    if not (filled := member.any(0)).all():
        raise ValueError(f"group {int((~filled).nonzero()[0])} has no rows")
    total, live = 0.0, 0
    for x, inside in zip(rows.split(4096), member.split(4096), strict=True):
        z = sae.encode(x)
        total = total + inside.T.to(z.dtype) @ z
        live = live + (z != 0).sum(0)
    mean = total / member.sum(0)[:, None]
    alive = live.nonzero().flatten()
    if not 1 <= top <= len(alive):
        raise ValueError(f"top must lie in 1..{len(alive)} (live latents), got {top}")
    value, latent = mean.topk(top, dim=1)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randperm(len(alive), generator=generator)[:top] for _ in latent]
        latent = alive[torch.stack(draws)]
    return sae.decode(torch.zeros_like(mean).scatter_(1, latent, value))
