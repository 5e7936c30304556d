"""The subjects' architectures: modules from pixels `(n, 784)` in [0, 1] to logits.

Every named sub-module is a hook point. Import them from `saeutils.models`.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

SIDE = 28  # an image is SIDE × SIDE pixels


class MLP(nn.Sequential):
    """Multi-layer perceptron on pixels; sub-modules fc1, fc2, …, head.

        h_0 = x,   h_i = relu(W_i h_{i-1} + b_i),   logits = W h_L + b

    Weights start uniform in ±1/√fan_in, drawn from `seed` alone (the global random
    state is neither read nor changed); biases start at zero.

    Args:
        hidden: width of each hidden layer, e.g. (128, 64) or (512, 256).
        d_in: pixels an image; n_classes: number of logits.

    Raises:
        ValueError: a width below 1; in `forward`, an input that is not (n, d_in).
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (128, 64),
        *,
        d_in: int = SIDE * SIDE,
        n_classes: int = 10,
        seed: int = 0,
    ):
        widths = (d_in, *hidden, n_classes)
        if min(widths) < 1:
            raise ValueError(f"every layer needs a unit or more, got widths {widths}")
        # skip_init: nn.Linear's own initialisation would draw from the global state.
        linears = [skip_init(nn.Linear, a, b) for a, b in pairwise(widths)]
        _draw(linears, seed)
        *body, head = linears
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, linear in enumerate(body, start=1):
            block = OrderedDict(linear=linear, relu=nn.ReLU())
            layers[f"fc{i}"] = nn.Sequential(block)
        layers["head"] = head
        super().__init__(layers)
        self.d_in = d_in

    def forward(self, x: Tensor) -> Tensor:
        _refuse_other_than_pixels(x, self.d_in)
        return super().forward(x)


class CNN(nn.Sequential):
    """Small convolutional network on pixels; sub-modules conv1, conv2, fc1, head.

        H_0 = x as a (1, 28, 28) map,   H_i = relu(W_i ⋆ H_{i-1} + b_i),  i = 1, 2
        h = relu(W vec(H_2) + b),       logits = W' h + b'

    ⋆ is a convolution with filters of 5 × 5 and 3 × 3 pixels, stride 2, zeros around:
    H_1 is (channels[0], 14, 14), H_2 is (channels[1], 7, 7). "conv1.conv" and
    "fc1.linear" are the pre-activations. Start values and seed as in `MLP`.

    Args:
        channels: filters of conv1 and conv2; hidden: width of fc1.
        n_classes: number of logits.

    Raises:
        ValueError: a width below 1; in `forward`, an input that is not (n, 784).
    """

    def __init__(
        self,
        channels: tuple[int, int] = (16, 32),
        hidden: int = 64,
        *,
        n_classes: int = 10,
        seed: int = 0,
    ):
        first, second = channels
        if min(first, second, hidden, n_classes) < 1:
            raise ValueError(
                "every layer needs a unit or more, got "
                f"channels {channels}, hidden {hidden}, n_classes {n_classes}"
            )
        convolutions = [
            skip_init(nn.Conv2d, 1, first, 5, padding=2, stride=2),
            skip_init(nn.Conv2d, first, second, 3, padding=1, stride=2),
        ]
        pixels = second * (SIDE // 4) ** 2
        linears = [
            skip_init(nn.Linear, pixels, hidden),
            skip_init(nn.Linear, hidden, n_classes),
        ]
        _draw([*convolutions, *linears], seed)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, conv in enumerate(convolutions, start=1):
            block = OrderedDict(conv=conv, relu=nn.ReLU())
            layers[f"conv{i}"] = nn.Sequential(block)
        block = OrderedDict(flatten=nn.Flatten(), linear=linears[0], relu=nn.ReLU())
        layers["fc1"] = nn.Sequential(block)
        layers["head"] = linears[1]
        super().__init__(layers)
        self.d_in = SIDE * SIDE

    def forward(self, x: Tensor) -> Tensor:
        _refuse_other_than_pixels(x, self.d_in)
        return super().forward(x.unflatten(1, (1, SIDE, SIDE)))


class EdgeMLP(nn.Sequential):
    """An MLP that is given edges, not pixels; sub-modules edges, fc1, fc2, …, head.

        E = mean over blocks of 4 × 4 pixels of relu(B ⋆ x),   then `MLP` on vec(E)

    B are the eight filters of `edge_filters`, which are never trained; E is (8, 7, 7)
    and comes flat from "edges".

    Args:
        hidden: width of each hidden layer; n_classes, seed: as in `MLP`.
        bank: "gabor" or "sobel".
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (128, 64),
        *,
        bank: str = "gabor",
        n_classes: int = 10,
        seed: int = 0,
    ):
        filters = edge_filters(bank)
        n, size, _ = filters.shape
        conv = skip_init(nn.Conv2d, 1, n, size, padding=size // 2, bias=False)
        conv.weight.data.copy_(filters.unsqueeze(1))
        conv.requires_grad_(False)
        mlp = MLP(hidden, d_in=n * (SIDE // 4) ** 2, n_classes=n_classes, seed=seed)
        edges = OrderedDict(
            conv=conv, relu=nn.ReLU(), pool=nn.AvgPool2d(4), flatten=nn.Flatten()
        )
        layers = OrderedDict(edges=nn.Sequential(edges)) | dict(mlp.named_children())
        super().__init__(OrderedDict(layers))
        self.d_in = SIDE * SIDE

    def forward(self, x: Tensor) -> Tensor:
        _refuse_other_than_pixels(x, self.d_in)
        return super().forward(x.unflatten(1, (1, SIDE, SIDE)))


def edge_filters(bank: str) -> Float[Tensor, "8 size size"]:
    """Filters for edges at 0, 45, 90, …, 315 degrees; each sums to 0, Σ|B| = 1.

        sobel:  (1 2 1)ᵀ (−1 0 1), 3 × 3, and its turned versions
        gabor:  exp(−(u² + v²) / 2σ²) sin(2π u / λ), 7 × 7, σ = 2, λ = 6 pixels

    Here u runs across the edge: filter 0 answers where ink begins on the right,
    filter 2 where it begins below, and filter i + 4 is minus filter i.

    Raises: ValueError for another bank.
    """
    if bank not in ("gabor", "sobel"):
        raise ValueError(f'bank must be "gabor" or "sobel", got {bank!r}')
    angle = torch.arange(4) * math.pi / 4
    if bank == "sobel":
        ring = torch.tensor([1, 2, 1, 0, -1, -2, -1, 0.0])  # clockwise from top right
        where = ([0, 1, 2, 2, 2, 1, 0, 0], [2, 2, 2, 1, 0, 0, 0, 1])
        half = torch.zeros(4, 3, 3)
        for i in range(4):
            half[i][where] = ring.roll(i)
    else:
        offset = torch.arange(-3.0, 4.0)
        v, u = torch.meshgrid(offset, offset, indexing="ij")
        across = u * angle.cos()[:, None, None] + v * angle.sin()[:, None, None]
        half = (-(u**2 + v**2) / 8).exp() * (2 * math.pi * across / 6).sin()
    filters = torch.cat([half, -half])
    return filters / filters.abs().sum((1, 2), keepdim=True)


def _draw(layers: Sequence[nn.Linear | nn.Conv2d], seed: int) -> None:
    """Weights uniform in ±1/√fan_in from `seed` alone, in order; biases zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        bound = layer.weight[0].numel() ** -0.5
        nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
        nn.init.zeros_(layer.bias)


def _refuse_other_than_pixels(x: Tensor, d_in: int) -> None:
    if x.ndim != 2 or x.shape[1] != d_in:
        raise ValueError(
            f"this model takes pixels of shape (n, {d_in}) in [0, 1], got "
            f"{tuple(x.shape)}; of an ImageData take its .pixels"
        )
