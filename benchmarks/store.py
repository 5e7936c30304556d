"""Writing and reading activations: this store beside sae_lens' cached activations.

    python benchmarks/store.py            # about two minutes on two cores
    python benchmarks/store.py --rows 1000000 --rounds 9

The same model, tokens and rows for all, in one process, one thread, interleaved;
medians over the rounds. Writing is timed with a model that costs nothing, and beside
the forward pass of a small transformer.
Reading: rows d = 256 float32 in batches of 4096, from the page cache.
"""

import argparse
import logging
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch

from saeutils.activations import save_activations
from saeutils.order import BufferShuffle, FullShuffle, mixing
from saeutils.store import ActivationStore

D, CONTEXT, VOCABULARY, BATCH = 256, 128, 1000, 4096
HOOK = "blocks.1.hook_resid_post"


def interleaved(rounds: int, **tasks: Callable[[], None]) -> dict[str, float]:
    """Median seconds of each task, after one round to warm up."""
    seconds = {name: [] for name in tasks}
    for round_ in range(rounds + 1):
        for name, task in tasks.items():
            began = time.perf_counter()
            task()
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(values) for name, values in seconds.items()}


def small_transformer() -> torch.nn.Module:
    """Two layers of width D: about as cheap a forward pass as there is."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=D,
            n_ctx=CONTEXT,
            d_head=64,
            n_heads=4,
            act_fn="gelu",
            d_vocab=VOCABULARY,
            device="cpu",
            seed=0,
        )
    )


def free_model(batch: int) -> torch.nn.Module:
    """A model that knows its activations already: what is left is the writing."""
    from transformer_lens.hook_points import HookedRootModule, HookPoint

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hook_resid_post = HookPoint()

    class Free(HookedRootModule):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), Block()])
            self.acts = torch.nn.Parameter(torch.randn(batch, CONTEXT, D))
            self.setup()

        def forward(self, tokens: torch.Tensor, **_: object) -> torch.Tensor:
            return self.blocks[1].hook_resid_post(self.acts[: len(tokens)])

    return Free()


def peer_runner(model: torch.nn.Module, tokens: torch.Tensor, path: Path, batch: int):
    """sae_lens' CacheActivationsRunner on our model and tokens, with no download."""
    import sae_lens.cache_activations_runner as module
    from datasets import Dataset
    from sae_lens import CacheActivationsRunnerConfig

    module.load_model = lambda **_: model
    config = CacheActivationsRunnerConfig(
        dataset_path="",
        model_name="",
        model_batch_size=batch,
        hook_name=HOOK,
        d_in=D,
        training_tokens=tokens.numel(),
        context_size=CONTEXT,
        new_cached_activations_path=str(path),
        shuffle=False,
        device="cpu",
        buffer_size_gb=0.25,
        prepend_bos=False,
        streaming=False,
    )
    rows = {"tokens": tokens.numpy()}
    dataset = Dataset.from_dict(rows).with_format("torch")
    return module.CacheActivationsRunner(config, override_dataset=dataset), config


def writing(n: int, batch: int, rounds: int, at: Path) -> None:
    tokens = torch.randint(VOCABULARY, (n, CONTEXT))
    transformer, free = small_transformer(), free_model(batch)

    def forward() -> None:
        with torch.no_grad():
            for start in range(0, n, batch):
                transformer(tokens[start : start + batch], stop_at_layer=2)

    def ours(model: torch.nn.Module) -> Callable[[], None]:
        def save() -> None:
            shutil.rmtree(at / "ours", ignore_errors=True)
            save_activations(
                model, tokens, HOOK, at / "ours", batch_size=batch, progress=False
            )

        return save

    def peer() -> None:
        shutil.rmtree(at / "peer", ignore_errors=True)
        peer_runner(free, tokens, at / "peer", batch)[0].run()

    seconds = interleaved(
        rounds,
        **{
            "forward pass alone": forward,
            "forward pass and ours": ours(transformer),
            "ours, writing alone": ours(free),
            "sae_lens, writing alone": peer,
        },
    )
    gigabytes = n * CONTEXT * D * 4 / 1e9
    print(f"\nWriting {n * CONTEXT:,} rows, {gigabytes:.2f} GB, {batch} texts a batch")
    for name, total in seconds.items():
        print(f"  {name:24} {total:6.2f} s, {gigabytes / total:5.2f} GB/s")
    ours_s, peer_s = list(seconds.values())[2:]
    share = ours_s / seconds["forward pass alone"]
    print(f"  ours writes {peer_s / ours_s:.1f} × as fast; it adds {share:.1%} to the")
    print("  forward pass of a two-layer transformer, less to any real one")


def reading(model: torch.nn.Module, n: int, rounds: int, at: Path) -> None:
    from sae_lens import ActivationsStore

    tokens = torch.randint(VOCABULARY, (n, CONTEXT))
    ours = save_activations(model, tokens, HOOK, at / "read", progress=False)[HOOK]
    runner, config = peer_runner(model, tokens, at / "peer-read", 32)
    runner.run()
    steps = len(ours) // BATCH

    def shuffled(workers: int, shuffle: str = "full") -> Callable[[], None]:
        def read() -> None:
            store = ActivationStore.open(at / "read")
            for rows, _ in store.batches(
                BATCH, steps=steps, workers=workers, shuffle=shuffle
            ):
                assert len(rows) == BATCH

        return read

    def in_order() -> None:
        for rows, _ in ours.chunks(BATCH):
            assert rows.shape[1] == D

    def peer_mixed() -> None:
        store = ActivationsStore.from_cache_activations(model, config)
        store.train_batch_size_tokens = BATCH
        for _ in range(steps):
            assert len(store.next_batch()) == BATCH

    def peer_in_order() -> None:
        store = ActivationsStore.from_cache_activations(model, config)
        for _ in range(n // 32):
            assert len(store.get_raw_llm_batch()[0]) == 32 * CONTEXT

    seconds = interleaved(
        rounds,
        **{
            "ours, full shuffle, no thread": shuffled(0),
            "ours, full shuffle, 1 thread": shuffled(1),
            "ours, buffer shuffle": shuffled(1, "buffer"),
            "ours, in order": in_order,
            "sae_lens, mixing buffer": peer_mixed,
            "sae_lens, in order": peer_in_order,
        },
    )
    gigabytes = n * CONTEXT * D * 4 / 1e9
    slowest = seconds["sae_lens, mixing buffer"]
    print(f"\nReading {n * CONTEXT:,} rows, {gigabytes:.2f} GB")
    for name, total in seconds.items():
        print(f"  {name:30} {gigabytes / total:5.2f} GB/s, {slowest / total:5.1f} ×")


def mixing_quality(n: int) -> None:
    documents = np.arange(n) // CONTEXT
    orders = {
        "full": FullShuffle(n, 0),
        "buffer, 256 blocks of 1024": BufferShuffle(n, 0, 1024, 256),
        "buffer, 64 blocks of 1024": BufferShuffle(n, 0, 1024, 64),
        "buffer, 8 blocks of 1024": BufferShuffle(n, 0, 1024, 8),
    }
    print(f"\nMixing {n:,} rows of texts of {CONTEXT}, in batches of {BATCH}")
    for name, order in orders.items():
        quality = mixing(order(0, n), documents, BATCH)
        print(
            f"  {name:30} correlation of successive rows {quality.correlation:+.4f}, "
            f"{quality.documents:5.0f} documents a batch ({quality.share:.0%})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=32, help="texts in a forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    model = small_transformer()
    n = arguments.rows // CONTEXT // 32 * 32
    with tempfile.TemporaryDirectory() as folder:
        reading(model, n, arguments.rounds, Path(folder))
        mixing_quality(10 * arguments.rows)
        writing(n, arguments.batch, arguments.rounds, Path(folder))


if __name__ == "__main__":
    main()
