"""Many configurations, and what they traded: grids, Pareto fronts, useless width.

configs = grid(TrainConfig(steps=2000), d_sae=[512, 2048], k=[8, 16, 32])
results = train_many(rows, configs, eval_rows=held_out)
frontier(results)      # one row a configuration, by L0 and FVU, with flags
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from saeutils.train_config import TrainConfig

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
