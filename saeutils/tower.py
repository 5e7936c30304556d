"""A tower of SAEs: each takes the codes of the one below as its data.

A row stays an image at every level, which is what tells a tower from a meta-SAE
(`saeutils.meta`). Its levels are scored through all decoders, down to activations:
a level's own loss falls when codes merely get smaller.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from saeutils import metrics
from saeutils.metrics import Scorecard
from saeutils.store import TensorStore, as_store
from saeutils.streaming import BUDGET, checked_chunks, rows_within
from saeutils.training import TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

NORMALISATIONS = ("per row", "summed")


class Tower:
    """SAEs on top of each other: each takes the codes of the one below.

    `encode` climbs, `decode` comes down to activations again, so that a tower of any
    height is scored as one SAE. `W_dec` is the product of the decoders: where one
    latent of the top moves the activations.
    """

    def __init__(self, saes: Sequence[Any]):
        self.saes = list(saes)

    @property
    def W_dec(self) -> Float[Tensor, "d_top d_in"]:
        product = self.saes[-1].W_dec
        for sae in reversed(self.saes[:-1]):
            product = product @ sae.W_dec
        return product

    def encode(self, x: Tensor) -> Tensor:
        for sae in self.saes:
            x = sae.encode(x)
        return x

    def decode(self, feature_acts: Tensor) -> Tensor:
        for sae in reversed(self.saes):
            feature_acts = sae.decode(feature_acts)
        return feature_acts


@dataclass(frozen=True, eq=False)
class Level:
    """One storey of a tower."""

    tower: Tower
    """This SAE and those below it."""
    loss: float
    """Squared error as this SAE's training logs it: mean over rows and dimensions of
    its own data, in their own units. Falls when codes shrink, whatever is learned."""
    own: Scorecard
    """On its own data: the codes below."""
    whole: Scorecard
    """From activations, up to here, and back to activations."""
    angles: tuple[float, float]
    """Mean and standard deviation, in degrees, of the angles between decoder rows."""
    by_chance: tuple[float, float]
    """The same for random directions in as many dimensions."""

    @property
    def alarm(self) -> str:
        """What has collapsed, in words; empty when nothing has."""
        return self.own.alarm or self.whole.alarm


def stack(
    rows: Any,
    widths: Sequence[int],
    *,
    l1_coefficient: int | float,
    normalisation: str = "per row",
    input_scale: str = "sqrt_d",
    config: TrainConfig | None = None,
    budget: int = 2**30,
    **scoring: Any,
) -> list[Level]:
    """A tower of L1 SAEs, each on the codes of the one below; one Level a width.

        per row   loss = mean over rows of (‖x − x̂‖² + λ ‖z‖₁)
        summed    loss = mean over rows AND dimensions of (x − x̂)² + λ Σ_rows ‖z‖₁

    The second is d · batch times as hard on the codes for the same λ, so it is the
    first with λ · d · batch: the same minimum, and with Adam the same steps. Where
    codes get smaller from level to level the penalty weighs more and more, unless
    each level's data are scaled to one size (`input_scale="sqrt_d"`; "none" is how
    it was done when a tower's loss fell to 1e-44 and passed for progress).

    The tower ends early where the codes are zero on every row: see the last `alarm`.

    Args:
        rows: activations: a store, its path, or a tensor.
        config: the rest of the recipe.
        budget: bytes that the codes of one level may take; they are held in memory.
        scoring: `model` and `data` of `metrics.scorecard`, to score in the model.

    Raises:
        ValueError: an unknown normalisation, or codes beyond the budget.
    """
    store = as_store(rows)
    if normalisation not in NORMALISATIONS:
        raise ValueError(
            f"normalisation is one of {NORMALISATIONS}, got {normalisation!r}"
        )
    need = 4 * len(store) * max(widths, default=0)
    if need > budget or not widths:
        raise ValueError(
            f"widths {list(widths)} on {len(store):,} rows: the codes of a level take "
            f"{need / 2**20:,.0f} MiB of {budget / 2**20:,.0f} MiB; use fewer rows, "
            "narrower levels or a larger budget, and one level or more"
        )
    config = config or TrainConfig("l1", l1_coefficient=1.0, revival=())
    levels, data, saes = [], store, []
    for width in widths:
        harder = data.d_in * config.batch_size if normalisation == "summed" else 1
        recipe = replace(
            config,
            architecture="l1",
            d_sae=width,
            l1_coefficient=l1_coefficient * harder,
            input_scale=input_scale,
            grad_clip=None,  # would tell the two losses apart by their size
        )
        result = train(data, recipe, progress=False)
        saes.append(result.sae)
        scale = result.info["input_scale"]
        level = Level(
            tower=(tower := Tower(saes)),
            loss=float(result.history["mse"].iloc[-1]) / scale**2 / data.d_in,
            own=metrics.scorecard(result.sae, data, eval_set="its own data"),
            whole=metrics.scorecard(tower, store, eval_set="activations", **scoring),
            angles=angles(result.sae.W_dec),
            by_chance=(90.0, random_angle_sd(data.d_in)),
        )
        levels.append(level)
        if level.own.l0 == 0:
            break
        data = TensorStore(_encoded(result.sae, data))
    return levels


def compare(
    rows: Any,
    widths: Sequence[int],
    *,
    l1_coefficient: int | float,
    config: TrainConfig,
    **scoring: Any,
) -> "pd.DataFrame":
    """Towers by both losses, on rescaled and on raw data: `tower_table` of all three.

    The column "loss" says which. λ of the summed loss is such that its first level is
    the same as with the loss per row on raw data.
    """
    import pandas as pd

    store = as_store(rows)
    same = l1_coefficient / (config.batch_size * store.d_in)
    hows = {
        "per row, rescaled": dict(l1_coefficient=l1_coefficient),
        "per row, raw": dict(l1_coefficient=l1_coefficient, input_scale="none"),
        "summed, raw": dict(
            l1_coefficient=same, normalisation="summed", input_scale="none"
        ),
    }
    tables = []
    for name, how in hows.items():
        levels = stack(store, widths, config=config, **how, **scoring)
        tables.append(tower_table(levels))
        tables[-1].insert(0, "loss", name)
    return pd.concat(tables, ignore_index=True)


def tower_table(levels: Sequence[Level], name: str = "level") -> "pd.DataFrame":
    """One row a level, numbers as numbers."""
    import pandas as pd

    out = []
    for i, level in enumerate(levels, start=1):
        row = {
            "name": f"{name} {i}",
            "loss (MSE)": level.loss,
            "FVU of its data": level.own.fvu,
            "FVU of activations": level.whole.fvu,
            "L0": level.own.l0,
        }
        if level.whole.in_model is not None:
            points = 100 * level.whole.in_model.delta_accuracy
            row["Δ accuracy (points)"] = points
        row |= {"mean angle (°)": level.angles[0], "sd of angles (°)": level.angles[1]}
        row |= {"sd by chance (°)": level.by_chance[1], "alarm": level.alarm}
        out.append(row)
    return pd.DataFrame(out)


def angles(W_dec: Float[Tensor, "d_sae d_in"]) -> tuple[float, float]:
    """Mean and standard deviation of the angles between all pairs of rows, degrees."""
    unit = F.normalize(W_dec.detach().double(), dim=1)
    n, total, square = 0, 0.0, 0.0
    for start, block in zip(range(0, len(unit), 512), unit.split(512), strict=True):
        degrees = (block @ unit.T).clamp(-1, 1).acos().rad2deg()
        later = torch.ones_like(degrees, dtype=torch.bool).triu(start + 1)
        pairs = degrees[later] - 90
        n += len(pairs)
        total += pairs.sum().item()
        square += pairs.square().sum().item()
    if n == 0:
        return math.nan, math.nan
    mean = total / n
    return 90 + mean, max(square / n - mean**2, 0) ** 0.5


def random_angle_sd(d: int) -> float:
    """Standard deviation, in degrees, of the angle between random directions in d
    dimensions: 57.3° / √d, the cosine's being 1 / √d. The mean is 90°."""
    return math.degrees(d**-0.5)


@torch.no_grad()
def _encoded(sae: Any, data: Any) -> Float[Tensor, "n d_sae"]:
    size = rows_within(BUDGET, sae.W_dec.shape[0])
    chunks = checked_chunks(data, data.d_in, size, sae.W_dec.device)
    return torch.cat([sae.encode(x).cpu() for x in chunks])
