"""Whether one way of doing it beats another: differences over seeds, with intervals.

Runs are compared pair by pair: what two runs of one seed share (start values, order
of batches, images) drops out of their difference.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


def paired_differences(
    frame: "pd.DataFrame",
    baseline: str,
    better: Mapping[str, int],
    *,
    pair: Sequence[str] = ("seed",),
    level: float = 0.95,
) -> "pd.DataFrame":
    """Difference of each "name" from the baseline, run by run, with its interval.

        d_s = value(name, s) − value(baseline, s),   mean(d) ± t sd(d) / √n

    with Student's t of n − 1 degrees of freedom, for n runs s: it holds for normal
    differences, and of many comparisons a share of 1 − level fails by chance.

    Args:
        frame: a row a run, with "name", the columns of `pair` and of `better`.
        better: column -> +1 if more of it is better, −1 if less is.
        pair: columns that say which runs belong together.

    Returns:
        One row a (name, column), without the baseline: sign (+1 or −1, from `better`),
        runs (pairs), value (mean), difference (mean), low, high, verdict: "better" or
        "worse" when the interval leaves out 0, else "unclear" (as with less than two
        pairs, or NaN).

    Raises:
        ValueError: a baseline or column that is not there, two runs of one name and
            one seed, or names whose runs are of other seeds than the baseline's.
    """
    import pandas as pd
    from scipy.stats import t

    pair = list(pair)
    if missing := [c for c in ("name", *pair, *better) if c not in frame]:
        raise ValueError(f"the frame has no column {missing[0]!r}: {list(frame)}")
    if baseline not in set(frame["name"]):
        raise ValueError(f"no run is named {baseline!r}, the baseline")
    if frame.duplicated(["name", *pair]).any():
        raise ValueError(f"two runs share name and {pair}: name them apart")
    runs = {n: part.set_index(pair) for n, part in frame.groupby("name", sort=False)}
    base, rows = runs.pop(baseline), []
    for name, part in runs.items():
        if set(part.index) != set(base.index):
            raise ValueError(
                f"{name!r} has {pair} {sorted(part.index)}, but {baseline!r} "
                f"{sorted(base.index)}: each difference needs both"
            )
        for column, sign in better.items():
            d = (part[column] - base[column]).to_numpy(float)
            n, mean, half = len(d), d.mean(), np.nan
            if n > 1:
                half = t.ppf((1 + level) / 2, n - 1) * d.std(ddof=1) / n**0.5
            low, high = mean - half, mean + half
            verdict = "unclear"
            if low > 0 or high < 0:
                verdict = "better" if sign * mean > 0 else "worse"
            rows.append(
                (name, column, sign, n, part[column].mean(), mean, low, high, verdict)
            )
    columns = ("sign", "runs", "value", "difference", "low", "high", "verdict")
    return pd.DataFrame(rows, columns=["name", "column", *columns])


def in_words(differences: "pd.DataFrame", column: str, digits: int = 2) -> str:
    """The verdicts on one column, a clause each: "PCA −0.003 ± 0.001 (better); …"."""
    part = differences[differences["column"] == column]
    return "; ".join(
        f"{row.name} {row.difference:+.{digits}f} ± "
        f"{row.high - row.difference:.{digits}f} ({row.verdict})".replace("-", "−")
        for row in part.itertuples(index=False, name="Row")
    )
