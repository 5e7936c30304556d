"""The shared training loop: one SAE, or many on the same batches.

    result = train(rows, TrainConfig(architecture="topk", d_sae=4096, k=32))
    result.sae            a stock sae_lens SAE, for raw rows
    result.history        loss, FVU, L0, dead latents … as a DataFrame
    result.scorecard      metrics on held-out rows

What happens to the rows: they are multiplied by one number, so that their mean norm
is √d_in (`input_scale`), which makes learning rates and penalties mean the same for
every model; `export` divides it out again. The batch order is a function of
(number of rows, data_seed, step) alone, so a run resumes at any step, bit for bit,
and does not depend on the number of processes.

On several CPU threads set OMP_WAIT_POLICY=passive before torch is imported: else
the threads of its matrix products spin for a while on the cores that the sparse
kernels need next (two threads then are 1.6 times as fast as one, in place of 2.0).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saeutils import runs
from saeutils.distributed import current_group
from saeutils.store import as_store
from saeutils.train_config import TrainConfig
from saeutils.trainer import Trainer, start_values

__all__ = ["TrainConfig", "TrainResult", "train", "train_many"]


@dataclass
class TrainResult:
    """What training gives back."""

    sae: Any
    """A stock sae_lens SAE that takes raw rows."""
    history: Any
    """DataFrame, a row every `log_every` steps: step, rows, loss, mse and fvu of the
    batch (in scaled units), l0, aux_loss, dead (latents), lr, seconds."""
    info: dict
    """init_rows, input_scale, threshold, seconds, rows_per_second, interrupted,
    messages (health warnings, as they were shown)."""
    config: TrainConfig
    _rows: Any = field(repr=False, default=None)
    _eval_rows: Any = field(repr=False, default=None)

    @property
    def held_out(self) -> bool:
        """Whether `scorecard` is on `eval_rows`."""
        return self._eval_rows is not None

    @cached_property
    def W_dec_init(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder before the first step, made again from the seed."""
        return start_values(self._rows, self.config)[0]["W_dec"]

    @cached_property
    def scorecard(self):
        """`metrics.scorecard` on `eval_rows`, or on the training rows if none."""
        from saeutils import metrics

        return metrics.scorecard(
            self.sae,
            self._eval_rows if self.held_out else self._rows,
            init=self.W_dec_init,
            eval_set="held-out rows" if self.held_out else "training rows",
        )


def train(
    rows,
    config: TrainConfig,
    *,
    path: str | Path | None = None,
    eval_rows=None,
    checkpoint_every: int | None = None,
    progress: bool = True,
    callback: Callable[[dict], None] | None = None,
) -> TrainResult:
    """Train one SAE.

    Args:
        rows: an ActivationStore or its path, a TensorStore, or a (n, d_in) tensor.
        path: run folder; holds config, history, checkpoints and the finished SAE.
            A run that was stopped goes on from its last checkpoint.
        eval_rows: rows that `result.scorecard` is computed on.
        checkpoint_every: steps between checkpoints; default a tenth of the run.
        callback: called with each row of the history as it is made, e.g.
            `lambda row: wandb.log(row)`.

    Ctrl-C ends training and returns what was trained so far.

    Raises:
        ValueError: rows empty or not (n, d_in), k > d_sae, or a run folder that
            belongs to another config or other data. Nothing is written then.
        FloatingPointError: the loss is not finite; names step and rows.
    """
    return train_many(
        rows,
        [config],
        path=path,
        eval_rows=eval_rows,
        progress=progress,
        checkpoint_every=checkpoint_every,
        callback=callback,
        _folders=[path],
    )[0]


@torch.no_grad()
def train_many(
    rows,
    configs: Sequence[TrainConfig],
    *,
    path: str | Path | None = None,
    eval_rows=None,
    checkpoint_every: int | None = None,
    progress: bool = True,
    callback: Callable[[dict], None] | None = None,
    _folders=None,
) -> list[TrainResult]:
    """Train many SAEs on the same batches, read once; each as `train` gives alone.

    The configs must share batch_size, data_seed and device; anything else may
    differ. Run folders are `path`/0, `path`/1, …; the callback's rows carry `run`.
    """
    from tqdm.auto import tqdm

    if not configs:
        raise ValueError("train_many: no configs")
    for name in ("batch_size", "data_seed", "device"):
        values = {getattr(c, name) for c in configs}
        if len(values) > 1:
            raise ValueError(
                f"train_many: configs differ in {name}: {sorted(values)}; "
                "they must share every batch"
            )
    store = as_store(rows)
    group = current_group(configs[0].device)
    batch_size = configs[0].batch_size
    if batch_size % group.world_size:
        raise ValueError(
            f"batch_size {batch_size} is not a multiple of the "
            f"{group.world_size} processes"
        )
    eval_rows = None if eval_rows is None else as_store(eval_rows)
    if eval_rows is not None and eval_rows.d_in != store.d_in:
        raise ValueError(f"eval_rows have d_in {eval_rows.d_in}, rows {store.d_in}")
    folders = _folders or [path and Path(path) / str(i) for i in range(len(configs))]
    trainers = [Trainer(store, c, group) for c in configs]
    if group.rank > 0:
        group.barrier()  # rank 0 makes the folders
    saved = [
        folder and runs.Run(folder, config, store, group.rank)
        for folder, config in zip(folders, configs, strict=True)
    ]
    if group.rank == 0:
        group.barrier()
    for trainer, run in zip(trainers, saved, strict=True):
        if run and run.checkpoint:
            trainer.load(run.checkpoint)
    steps = max(c.steps for c in configs)
    every = checkpoint_every or max(1, steps // 10)
    start = min(t.done for t in trainers)
    batches = store.batches(
        batch_size // group.world_size,
        seed=configs[0].data_seed,
        steps=steps,
        start=start,
        rank=group.rank,
        world_size=group.world_size,
    )
    bar = tqdm(
        total=steps,
        initial=start,
        desc=_describe(configs),
        unit="step",
        disable=not progress or group.rank > 0,
    )
    interrupted = False
    try:
        for step, batch in enumerate(batches, start):
            for i, trainer in enumerate(trainers):
                if trainer.done == step < trainer.config.steps:
                    row = trainer.step(batch.rows, batch.index)
                    if row and callback and group.rank == 0:
                        callback(row | ({"run": i} if len(trainers) > 1 else {}))
            if (step + 1) % every == 0 and step + 1 < steps:
                for trainer, run in zip(trainers, saved, strict=True):
                    if run and group.rank == 0 and trainer.done == step + 1:
                        run.save_checkpoint(trainer.state())
            bar.update()
            if trainers[0].history:
                last = trainers[0].history[-1]
                bar.set_postfix(
                    {n: f"{last[n]:.4g}" for n in ("fvu", "l0", "dead")}, refresh=False
                )
    except KeyboardInterrupt:
        interrupted = True
    except RuntimeError as error:
        lost = any(word in str(error) for word in ("gloo", "NCCL", "onnection"))
        if group.world_size == 1 or not lost:
            raise
        raise ConnectionError(
            f"rank {group.rank}: another process of this run was lost at step "
            f"{trainers[0].done}; start again, with any number of processes, and it "
            "goes on from the last checkpoint"
        ) from error
    finally:
        bar.close()
    results = []
    for trainer, run in zip(trainers, saved, strict=True):
        result = TrainResult(
            *trainer.finish(interrupted), trainer.config, store, eval_rows
        )
        if run and group.rank == 0:
            run.save_checkpoint(trainer.state())
            run.save_result(result)
        results.append(result)
    return results


def _describe(configs: Sequence[TrainConfig]) -> str:
    if len(configs) > 1:
        return f"{len(configs)} SAEs"
    return f"{configs[0].architecture} {configs[0].d_sae}"
