"""SAEs trained on known truths and scored: over sizes, over truths, on a benchmark.

size_sweep(truth, widths=[64, 128], ks=[2, 4], l1s=[1.0], steps=400)
phase(features=[64, 128], at_once=[2, 4], d=32, steps=400)
on_benchmark(SynthBench(1 / 16), steps=150)
"""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from saeutils import metrics
from saeutils.recovery import Recovery, controls, recovery
from saeutils.synth_bench import PUBLISHED, SynthBench
from saeutils.synthetic import Synthetic, SyntheticConfig
from saeutils.training import TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

ROWS, SCORED = 20_000, 4000  # of training (drawn once), and of scoring
SMALL = dict(batch_size=512, lr=1.5e-2)  # of SAEs with some hundred latents
PUBLISHED_K, PUBLISHED_L0 = 25, 34


def size_sweep(
    truth: Synthetic,
    *,
    widths: Sequence[int],
    ks: Sequence[int] = (),
    l1s: Sequence[int | float] = (),
    steps: int = 400,
) -> "pd.DataFrame":
    """TopK and L1 SAEs of many sizes, two seeds of each.

    Columns: name ("TopK, k = 2"), latents, FVU, L0, found (share of the features with
    a cosine above 0.9) of the first seed, and agreement (`metrics.agreement`) of both,
    which needs no truth.
    """
    import pandas as pd

    recipes = {f"TopK, k = {k}": dict(architecture="topk", k=k) for k in ks}
    for c in l1s:
        recipes[f"L1, coefficient {c}"] = dict(architecture="l1", l1_coefficient=c)
    rows, out = truth.rows(ROWS), []
    for name, recipe in recipes.items():
        for width in widths:
            shared = SMALL | recipe | dict(d_sae=width, steps=steps)
            pair = [
                train(rows, TrainConfig(**shared, seed=s), progress=False).sae
                for s in (0, 1)
            ]
            got = recovery(pair[0], truth, rows=SCORED)
            out.append({"name": name, "latents": width, "FVU": 1 - got.r2})
            agreement = metrics.agreement([sae.W_dec for sae in pair])
            out[-1] |= {"L0": got.l0, "found": got.share(), "agreement": agreement}
    return pd.DataFrame(out)


def phase(
    features: Sequence[int], at_once: Sequence[int], *, d: int, steps: int = 400
) -> np.ndarray:
    """Share of features found by TopK with as many latents and the true k.

    Rates are equal. A row for each number of features, a column for each `at_once`.
    """
    found = np.zeros((len(features), len(at_once)))
    for i, n in enumerate(features):
        for j, l0 in enumerate(at_once):
            shape = dict(n=n, d=d, l0=l0, frequency="uniform", largest=0.5)
            truth = Synthetic(SyntheticConfig(**shape))
            config = TrainConfig("topk", n, l0, **SMALL, steps=steps)
            sae = train(truth.rows(ROWS), config, progress=False).sae
            found[i, j] = recovery(sae.W_dec, truth).share()
    return found


def benchmark_recipes(truth: SynthBench) -> dict[str, dict]:
    """Of the published trainers: width n / 4, and k 25 of 34 features on a row; at a
    smaller scale as much less as features fire there."""
    width, k = truth.n // 4, PUBLISHED_K
    if truth.n != 16_384:
        k = max(1, round(truth.rates.sum().item() * PUBLISHED_K / PUBLISHED_L0))
    nested = tuple(sorted({max(1, width // part) for part in (32, 8, 2, 1)}))
    shared = dict(d_sae=width, k=k)
    return {
        "matryoshka": shared | dict(architecture="matryoshka", widths=nested),
        "batchtopk": shared | dict(architecture="batchtopk"),
    }


def on_benchmark(
    truth: SynthBench,
    *,
    steps: int,
    batch_size: int = 1024,
    lr: float = 4e-3,
    rows: int = 0,
    saes: dict | None = None,
) -> "pd.DataFrame":
    """Our trainers on the benchmark; at full size the published figures beside them.

    The last row is the null: as many random directions.

    Args:
        rows: held in memory; 0 streams, so that no row comes twice.
        saes: filled with the trained SAEs, if given.
    """
    import pandas as pd

    data = truth.rows(rows) if rows else truth.stream(10**9)
    out = []
    for name, recipe in benchmark_recipes(truth).items():
        own = dict(steps=steps, batch_size=batch_size, lr=lr, device=truth.device)
        start = time.process_time()
        sae = train(data, TrainConfig(**recipe, **own), progress=False).sae
        seconds = time.process_time() - start
        out.append(benchmark_row(recovery(sae, truth, rows=8192, name=name), seconds))
        if truth.n == 16_384:
            scores = ("F1", "MCC", "uniqueness", "R²")
            figures = dict(zip(scores, PUBLISHED[name], strict=True))
            out.append({"name": f"{name}, published", **figures, "L0": PUBLISHED_K})
        if saes is not None:
            saes[name] = sae
    null = list(controls(truth, truth.n // 4).values())[-1]
    got = recovery(null, truth, rows=8192, name="random dictionary")
    return pd.DataFrame([*out, benchmark_row(got)])


def benchmark_row(got: Recovery, seconds: float = float("nan")) -> dict:
    """The published measures of one candidate."""
    scores = {"F1": got.f1_latents, "MCC": got.mcc, "uniqueness": got.uniqueness}
    rest = {"R²": got.r2, "L0": got.l0, "CPU seconds": seconds}
    return {"name": got.name} | scores | rest
