"""Recovery before and after refinement, on seeds that were never looked at before.

    python benchmarks/refinement.py                       five cases, seeds 21 … 25
    python benchmarks/refinement.py --cases large --seeds 21 --out scores.csv
    python benchmarks/refinement.py --show a.csv b.csv    the table again

Settings and rules were chosen on seeds 0 and 1. A row for each of: the SAE, its
refinement with sparse inference, the same with an encoder, the plain alternation
(--plain), two oracles and a random dictionary. Seconds are of the CPU.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from saeutils.recovery import controls, recovery
from saeutils.refinement import fit_encoder, refine
from saeutils.synthetic import Synthetic, SyntheticConfig
from saeutils.training import TrainConfig, train

CASES = {
    "independent": {},
    "noise": dict(noise=0.1),
    "correlated": dict(firing="correlated", correlation=0.5),
    "hierarchy": dict(firing="hierarchy", group=7),
    "large": dict(n=2048, d=256, l0=16),
}
RECIPE = dict(steps=1000, batch_size=2048, lr=1.5e-2)
RECIPES = {"large": dict(steps=6000, batch_size=256, lr=4e-3)}
REFINING = {"large": dict(rounds=14, batch=8192)}
COLUMNS = ("found > 0.9", "rarest quarter", "MMCS", "F1", "L0", "R²", "seconds")


def scores(case: str, seed: int, options: argparse.Namespace) -> list[dict]:
    """Rows of the table for one truth."""
    own = dict(n=512, d=128, l0=8) | CASES[case]
    truth = Synthetic(SyntheticConfig(**own, seed=seed))
    rows = truth.rows(options.rows)
    recipe = RECIPE | RECIPES.get(case, {})
    k = round(1.5 * own["l0"])
    start = time.process_time()
    with torch.enable_grad():
        config = TrainConfig("topk", truth.n, k, seed=seed, **recipe)
        sae = train(rows, config, progress=False).sae
    trained = time.process_time()
    how = dict(rounds=options.rounds, encoder=False) | REFINING.get(case, {})
    out = refine(sae, rows, **how)
    refined = time.process_time()
    full = fit_encoder(out.coder, rows)
    candidates = {
        "SAE": (sae, trained - start),
        "refined": (out.coder, refined - trained),
        "refined, encoder": (full, time.process_time() - refined),
    }
    if options.plain:
        bare = refine(sae, rows, groups=False, absorption=False, **how)
        candidates["plain alternation"] = (bare.coder, float("nan"))
    for name, one in controls(truth, truth.n).items():
        candidates[name] = (one, float("nan"))
    return [
        {"case": case, "seed": seed, "seconds": seconds}
        | recovery(one, truth, rows=options.held_out, name=name).row()
        for name, (one, seconds) in candidates.items()
    ]


def show(table: pd.DataFrame) -> None:
    """Mean ± standard deviation over seeds."""
    for case, part in table.groupby("case", sort=False):
        seeds = part["seed"].unique().tolist()
        print(
            f"\n{case}, seeds {seeds}\n{'':28}" + "".join(f"{c:>16}" for c in COLUMNS)
        )
        for name, group in part.groupby("name", sort=False):
            cells = (
                f"{group[c].mean():.3f} ± {group[c].std(ddof=0):.3f}" for c in COLUMNS
            )
            print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23, 24, 25])
    parser.add_argument("--rows", type=int, default=100_000, help="of training")
    parser.add_argument("--held-out", type=int, default=5000, help="rows scored")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--out", type=Path, help="CSV, grows with each truth")
    parser.add_argument("--show", type=Path, nargs="+", help="only print these")
    options = parser.parse_args()
    if options.show:
        return show(pd.concat(map(pd.read_csv, options.show)))
    table = pd.DataFrame()
    for seed in options.seeds:
        for case in options.cases:
            new = pd.DataFrame(scores(case, seed, options))
            table = pd.concat([table, new], ignore_index=True)
            print(new[["case", "seed", "name", *COLUMNS[:4], "seconds"]], flush=True)
            if options.out:
                table.to_csv(options.out, index=False)
    show(table)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
