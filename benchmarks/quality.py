"""Final quality at equal samples: FVU of our trainer against sae_lens' own.

    make bench ARGS=quality

Speed must not buy quality. On three tasks both trainers see the same number of the
same rows, with the same d_sae, k, batch size, peak learning rate and its schedule;
FVU is measured on held-out rows, by one function, with L0 = k for both (TopK).

    mnist      fc1 of an MLP on MNIST, d 128 → 1024, k 16
    language   MLP output of a one-layer byte-level transformer that is trained
               here on the source text of Python's standard library, d 128 → 1024, k 32
    synthetic  sums of 8 of 512 directions in 128 dimensions with noise, → 1024, k 8
"""

import argparse
import contextlib
import io
import statistics
import sys
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from saeutils import datasets, metrics, models
from saeutils.training import TrainConfig, train

STEPS, BATCH, D_SAE = 1500, 512, 1024


def mnist() -> tuple[Tensor, Tensor, int]:
    torch.manual_seed(0)
    model = models.MLP()
    models.train_classifier(model, datasets.mnist("train"), progress=False)
    with torch.no_grad():
        held_out = model.fc1(datasets.mnist("test").pixels)
        return model.fc1(datasets.mnist("train").pixels), held_out, 16


def language() -> tuple[Tensor, Tensor, int]:
    """Rows are the MLP's output at every position but the first 8 of a context."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(library.glob("*.py"))
    text = b"".join(f.read_bytes() for f in files)[: 4 * 2**20]
    tokens = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    tokens = tokens[: len(tokens) // 64 * 64].reshape(-1, 64)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.manual_seed(0))]
    model = GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=256, hidden_size=128, num_layers=1, num_heads=4,
            attention_types=[[["global"], 1]], max_position_embeddings=64,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    steps = 400
    for step in range(steps):
        batch = tokens[torch.arange(step * 32, step * 32 + 32) % (len(tokens) - 2000)]
        loss = model(batch, labels=batch).loss
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, 3 * (1 - step / steps))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"language: {loss.item():.2f} nats a byte after {steps} steps")
    found = []
    model.transformer.h[0].mlp.register_forward_hook(
        lambda _module, _inputs, output: found.append(output[:, 8:].flatten(0, 1))
    )
    with torch.no_grad():
        for batch in tokens[-2000:].split(100):
            model(batch)
    rows = torch.cat(found)
    rows = rows[torch.randperm(len(rows), generator=torch.manual_seed(1))]
    return rows[:-10_000], rows[-10_000:], 32


def synthetic() -> tuple[Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(512, 128, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    chosen = torch.rand(70_000, 512, generator=generator).topk(8).indices
    strength = torch.rand(70_000, 8, 1, generator=generator) + 0.5
    rows = torch.stack([(directions[c] * s).sum(0) for c, s in zip(chosen, strength)])  # noqa: B905
    rows += 0.02 * torch.randn(rows.shape, generator=generator)
    return rows[:60_000], rows[60_000:], 8


def train_sae_lens(rows: Tensor, k: int, lr: float, seed: int, steps: int):
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    def batches():
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from (
                rows[index]
                for index in torch.randperm(len(rows), generator=generator).split(BATCH)
                if len(index) == BATCH
            )

    config = SAETrainerConfig(
        n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
        total_training_samples=steps * BATCH, train_batch_size_samples=BATCH,
        device="cpu", autocast=False, lr=lr, lr_end=lr, lr_scheduler_name="constant",
        lr_warm_up_steps=steps // 20, lr_decay_steps=steps // 5, n_restart_cycles=1,
        adam_beta1=0.9, adam_beta2=0.999, dead_feature_window=steps // 20,
        feature_sampling_window=2000, logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=32,
    )  # fmt: skip
    torch.manual_seed(seed)
    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=rows.shape[1], d_sae=D_SAE, k=k,
            normalize_activations="expected_average_only_in",
        )
    )  # fmt: skip
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
        return SAETrainer(config, sae, batches()).fit().eval()


def train_ours(rows: Tensor, k: int, lr: float, seed: int, steps: int):
    config = TrainConfig(
        d_sae=D_SAE,
        k=k,
        lr=lr,
        steps=steps,
        batch_size=BATCH,
        seed=seed,
        data_seed=seed,
    )
    return train(rows, config, progress=False).sae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tasks", nargs="*", default=["mnist", "language", "synthetic"]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lrs", nargs="*", type=float, default=[4e-3])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{args.steps} steps of {BATCH} rows; FVU on held-out rows, each seed")
    print("task          lr  trainer    FVU" + " " * 29 + "mean   dead %  ours/theirs")
    for task in args.tasks:
        rows, held_out, k = getattr(sys.modules[__name__], task)()
        for lr in args.lrs:
            means = {}
            for trainer in (train_sae_lens, train_ours):
                cards = [
                    metrics.scorecard(
                        trainer(rows, k, lr, seed, args.steps),
                        held_out,
                        eval_set="held out",
                    )
                    for seed in range(args.seeds)
                ]
                fvus = [card.fvu for card in cards]
                means[trainer] = statistics.mean(fvus)
                ratio = ""
                if trainer is train_ours:
                    ratio = f"{means[train_ours] / means[train_sae_lens]:.3f}"
                dead = 100 * statistics.mean(card.dead for card in cards)
                each = "  ".join(f"{f:.4f}" for f in fvus)
                name = trainer.__name__.removeprefix("train_")
                print(
                    f"{task:10} {lr:>5.0e}  {name:10} {each:30}"
                    f"{means[trainer]:.4f}   {dead:>5.1f}  {ratio}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
