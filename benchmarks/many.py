"""Eight SAEs on one read of a store against one SAE, and what bfloat16 costs in loss.

    make bench ARGS=many

The store is on disk, 200,000 rows of 256; rounds are interleaved, medians compared.
"""

import argparse
import statistics
import tempfile
import time

import torch
from torch import nn

from saeutils.activations import save_activations
from saeutils.sweep import grid
from saeutils.training import TrainConfig, train_many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(1024, 256, generator=generator)
    codes = torch.rand(200_000, 8, generator=generator)
    chosen = torch.randint(1024, (200_000, 8), generator=generator)
    rows = nn.functional.embedding_bag(
        chosen, directions, per_sample_weights=codes, mode="sum"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = nn.Sequential(nn.Identity())
        store = save_activations(model, rows, "0", folder, progress=False)["0"]
        base = TrainConfig(d_sae=2048, steps=args.steps, batch_size=2048, lr=4e-3)
        eight = grid(base, k=[8, 16, 32, 64], seed=[0, 1])

        def seconds(configs):
            began = time.perf_counter()
            train_many(store, configs, progress=False)
            return time.perf_counter() - began

        seconds(eight[:1])
        pairs = [(seconds(eight), [seconds([c]) for c in eight])
                 for _ in range(args.rounds)]  # fmt: skip
        together = statistics.median(t for t, _ in pairs)
        alone = statistics.median(sum(each) for _, each in pairs)
        print(
            f"8 SAEs of 2,048 latents, {args.steps} steps: together {together:.2f} s, "
            f"one after another {alone:.2f} s, ratio {8 * together / alone:.2f} of 8"
        )
        half = [
            TrainConfig(
                d_sae=2048, k=8, steps=1000, batch_size=512, lr=4e-3, encoder_dtype=d
            )
            for d in ("float32", "bfloat16")
        ]
        exact, low = (
            r.history.fvu.tail(20).mean()
            for r in train_many(store, half, progress=False)
        )
        print(
            f"FVU after 1,000 steps: float32 {exact:.4f}, bfloat16 encoder {low:.4f}, "
            f"relative difference {low / exact - 1:+.2%}"
        )


if __name__ == "__main__":
    main()
