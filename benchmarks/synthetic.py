"""Recovery on SynthSAEBench, rebuilt offline: our trainers, and refinement.

    python benchmarks/synthetic.py                      1/16 of the size, minutes
    python benchmarks/synthetic.py --scale 1 --steps 200000 --device cuda

At scale 1 this is the published set-up (16,384 features, d 768, width 4,096, L0 25,
200 M rows at --steps 195313), whose published figures are printed beside. At a smaller
scale everything shrinks alike but L0, which is scaled so that it stays below the true
one; nothing published compares with that.
"""

import argparse
import time

import torch

from saeutils.recovery import controls, recovery
from saeutils.refinement import refine
from saeutils.synth_bench import PUBLISHED, SynthBench
from saeutils.training import TrainConfig, train


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
    width, l0 = truth.n // 4, truth.rates.sum().item()
    k = 25 if options.scale == 1 else max(1, round(l0 * 25 / 34))
    rows = truth.rows(options.rows) if options.rows else truth.stream(10**9)
    print(f"{truth.n} features, d {truth.d}, true L0 {l0:.1f}; width {width}, k {k}")
    print(f"{'':24}{'F1':>7}{'MCC':>7}{'unique':>8}{'R²':>7}{'L0':>7}{'s':>7}")

    def show(name: str, one, seconds: float = 0.0) -> None:
        got = recovery(one, truth, rows=8192)
        print(
            f"{name:24}{got.f1_latents:7.3f}{got.mcc:7.3f}{got.uniqueness:8.3f}"
            f"{got.r2:7.3f}{got.l0:7.2f}{seconds:7.0f}",
            flush=True,
        )

    nested = tuple(sorted({max(1, width // part) for part in (32, 8, 2, 1)}))
    for name in ("matryoshka", "batchtopk"):
        config = TrainConfig(
            name,
            width,
            k,
            widths=nested if name == "matryoshka" else (),
            steps=options.steps,
            batch_size=options.batch_size,
            lr=options.lr,
            device=options.device,
        )
        start = time.process_time()
        sae = train(rows, config, progress=False).sae
        show(name, sae, time.process_time() - start)
        if options.scale == 1:
            f1, mcc, unique, r2 = PUBLISHED[name]
            print(f"{'  published':24}{f1:7.3f}{mcc:7.3f}{unique:8.3f}{r2:7.3f}")
        if options.refine and options.device == "cpu":
            start = time.process_time()
            out = refine(sae, rows, rounds=12)
            show("  refined", out.coder, time.process_time() - start)
    *_, (name, null) = controls(truth, width).items()
    show(name, null)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
