"""Recovery on SynthSAEBench, rebuilt offline: our trainers, and refinement.

    python benchmarks/synthetic.py                      1/16 of the size, minutes
    python benchmarks/synthetic.py --scale 1 --rows 0 --steps 195313 --device cuda

At scale 1 this is the published set-up (16,384 features, d 768, width 4,096, L0 25,
200 M rows), whose published figures are printed beside. At a smaller scale everything
shrinks alike but L0, which is scaled so that it stays below the true one; nothing
published compares with that.
"""

import argparse
import time

import pandas as pd
import torch

from saeutils.recovery import recovery
from saeutils.recovery_runs import benchmark_row, on_benchmark
from saeutils.refinement import refine
from saeutils.synth_bench import SynthBench


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1 / 16)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--rows", type=int, default=200_000, help="held; 0 streams")
    parser.add_argument("--refine", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()

    truth = SynthBench(options.scale, device=options.device)
    l0 = truth.rates.sum().item()
    print(f"{truth.n} features, d {truth.d}, true L0 {l0:.1f}, width {truth.n // 4}")
    saes = {}
    table = on_benchmark(
        truth,
        steps=options.steps,
        batch_size=options.batch_size,
        lr=options.lr,
        rows=options.rows,
        saes=saes,
    )
    print(table.round(3).to_string(index=False), flush=True)
    if options.refine and options.device == "cpu":
        rows, refined = truth.rows(options.rows or 200_000), []
        for name, sae in saes.items():
            start = time.process_time()
            coder = refine(sae, rows, rounds=12).coder
            seconds = time.process_time() - start
            got = recovery(coder, truth, rows=8192, name=f"{name}, refined")
            refined.append(benchmark_row(got, seconds))
        print(pd.DataFrame(refined).round(3).to_string(index=False))


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
