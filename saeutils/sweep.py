"""Many configurations, and what they traded: grids, Pareto fronts, useless width.

`train_all` and `match_l0` take configurations by name, which `train_many` does not.

configs = grid(TrainConfig(steps=2000), d_sae=[512, 2048], k=[8, 16, 32])
results = train_many(rows, configs, eval_rows=held_out)
frontier(results)      # one row a configuration, by L0 and FVU, with flags
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from saeutils.train_config import TrainConfig
from saeutils.training import TrainResult, train_many

if TYPE_CHECKING:
    import pandas as pd


def grid(base: TrainConfig, **axes: Sequence) -> list[TrainConfig]:
    """Every combination of the values of `axes`, the last axis fastest.

    Raises: ValueError for an unknown or empty axis, or a combination that
        contradicts itself.
    """
    for name, values in axes.items():
        if not hasattr(base, name):
            raise ValueError(f"grid: TrainConfig has no {name!r}")
        if len(values) == 0:
            raise ValueError(f"grid: no values for {name}")
    combinations = product(*axes.values())
    return [replace(base, **dict(zip(axes, c, strict=True))) for c in combinations]


def train_all(
    rows, configs: Mapping[Hashable, TrainConfig], **options
) -> dict[Hashable, TrainResult]:
    """`train_many` by name, one read of the data for each batch size among `configs`.

    Args:
        options: for `train_many`, e.g. progress=False.
    """
    done = {}
    for size in sorted({c.batch_size for c in configs.values()}):
        same = {name: c for name, c in configs.items() if c.batch_size == size}
        done |= dict(
            zip(same, train_many(rows, [*same.values()], **options), strict=True)
        )
    return {name: done[name] for name in configs}


def match_l0(
    rows,
    configs: Mapping[Hashable, TrainConfig],
    l0: int | float,
    coefficients: Sequence[int | float],
    **options,
) -> dict[Hashable, TrainConfig]:
    """The configurations, those with an L1 penalty changed to fire `l0` latents a row.

    Each of them is trained with each of the `coefficients`; between these, log L0 of
    the last batches is taken as linear in log λ. What lies outside gets the nearest.

    Raises: ValueError when the coefficients are not positive and rising.
    """
    if not coefficients or list(coefficients) != sorted(
        {c for c in coefficients if c > 0}
    ):
        raise ValueError(f"coefficients must be positive and rise, got {coefficients}")
    tried = {
        (name, value): replace(config, l1_coefficient=value)
        for name, config in configs.items()
        if config.architecture in ("l1", "gated")
        for value in coefficients
    }
    reached = {
        key: max(result.history["l0"].iloc[-1], 1e-9)
        for key, result in train_all(rows, tried, **options).items()
    }
    matched = dict(configs)
    for name in dict.fromkeys(name for name, _ in tried):
        # np.interp wants rising x: L0 falls with λ
        falling = np.minimum.accumulate([reached[name, c] for c in coefficients])
        log = np.interp(-np.log(l0), -np.log(falling), np.log(coefficients))
        matched[name] = replace(configs[name], l1_coefficient=float(np.exp(log)))
    return matched


def frontier(results: Sequence, tolerance: float = 0.02) -> "pd.DataFrame":
    """FVU against L0 of every result of `train_many`, best trade-offs marked.

    Columns: run (number in `results`), architecture, d_sae, seed, l0, fvu, dead
    (share), and
        pareto   no other run has both smaller L0 and smaller FVU (or equal in one)
        wider_is_no_better   a run of the same architecture with fewer latents and no
            more L0 (both within `tolerance`, relative) reaches at least its FVU:
            more width bought nothing
    """
    import pandas as pd

    rows = []
    for i, result in enumerate(results):
        card, config = result.scorecard, result.config
        rows.append(
            {
                "run": i,
                "architecture": config.architecture,
                "d_sae": config.d_sae,
                "seed": config.seed,
                "l0": card.l0,
                "fvu": card.fvu,
                "dead": card.dead,
            }
        )
    table = pd.DataFrame(rows)
    pareto, wasted = [], []
    for row in table.itertuples():
        better = (table.l0 <= row.l0) & (table.fvu <= row.fvu)
        strictly = (table.l0 < row.l0) | (table.fvu < row.fvu)
        pareto.append(not (better & strictly).any())
        narrower = (table.d_sae < row.d_sae) & (table.architecture == row.architecture)
        as_sparse = table.l0 <= row.l0 * (1 + tolerance)
        as_good = table.fvu <= row.fvu * (1 + tolerance)
        wasted.append(bool((narrower & as_sparse & as_good).any()))
    return table.assign(pareto=pareto, wider_is_no_better=wasted).sort_values(
        ["l0", "fvu"], ignore_index=True
    )
