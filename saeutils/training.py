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
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saeutils import kernels, objectives, revival, runs
from saeutils.distributed import Group, current_group
from saeutils.kernels import Weights
from saeutils.objectives import Penalty, StepOutput
from saeutils.sae import ARCHITECTURES, Params, export, initial_params
from saeutils.store import as_store

INIT_ROWS = 16_384  # rows that b_dec, the input scale and the variance are taken from
THRESHOLD_ROWS = 65_536  # rows that BatchTopK's inference threshold is taken from
SPARSE_BELOW = 1 / 16  # density of latents under which the sparse step pays


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what is trained; saved beside the result.

    Raises: ValueError for values that contradict each other.
    """

    architecture: Literal[
        "topk", "batchtopk", "matryoshka", "l1", "jumprelu", "gated"
    ] = "topk"
    d_sae: int = 4096
    """Number of latents."""
    k: float = 32
    """Latents a row (TopK), or on average (BatchTopK, Matryoshka)."""
    l1_coefficient: float = 0.0
    """λ of L1 and Gated, for rows of norm √d_in."""
    l0_coefficient: float = 0.0
    """λ of JumpReLU."""
    widths: tuple[int, ...] = ()
    """Matryoshka: nested widths, rising, the last one d_sae."""
    bandwidth: float = 0.5
    """JumpReLU: width of the rectangle that stands for the step's gradient."""
    threshold: float = 0.5
    """JumpReLU: start value."""

    steps: int = 3000
    batch_size: int = 1024
    """Rows a step, over all processes."""
    lr: float = 1e-3
    lr_warm_up_steps: int | None = None
    """Linear rise from 0; None: steps // 20."""
    lr_decay_steps: int | None = None
    """Linear fall to 0 at the end; None: steps // 5."""
    sparsity_warm_up_steps: int | None = None
    """Linear rise of l1/l0_coefficient; None: steps // 10."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's."""
    grad_clip: float | None = None
    """Largest allowed norm of the whole gradient."""

    seed: int = 0
    """Of the start values."""
    data_seed: int = 0
    """Of the batch order."""
    input_scale: Literal["sqrt_d", "none"] = "sqrt_d"
    """"sqrt_d": one factor for all rows, after which their mean norm is √d_in."""
    b_dec_init: Literal["mean", "median", "zero"] = "mean"
    """Mean or geometric median of up to 16,384 rows (the number is in `info`)."""
    decoder_init: Literal["random", "data"] = "random"
    """Gaussian directions, or those of centred rows."""
    encoder_scale: float = 1.0
    """W_enc starts as encoder_scale · W_decᵀ."""
    pre_encoder_bias: bool = True
    """The encoder sees x − b_dec."""
    unit_norm_decoder: bool = True
    """Rows of W_dec are scaled to length 1 after every step."""
    remove_parallel_grad: bool = True
    """Drop the part of W_dec's gradient that would only change a row's length."""

    revival: tuple[Literal["auxk", "ghost", "resample"], ...] = ("auxk",)
    """What is done about dead latents, see `saeutils.revival`; () for nothing."""
    dead_after: int | None = None
    """Rows without firing after which a latent is dead; None: 1/20 of the run."""
    aux_coefficient: float = 1 / 32
    """AuxK's α."""
    k_aux: int | None = None
    """AuxK's number of latents; None: d_in // 2."""
    resample_steps: tuple[int, ...] = ()

    encoder_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the encoder's product while training."""
    device: str = "cpu"
    log_every: int | None = None
    """Steps between two rows of `history`; None: 200 rows a run."""

    def __post_init__(self) -> None:
        def need(condition: bool, message: str) -> None:
            if not condition:
                raise ValueError(f"TrainConfig: {message}")

        name = self.architecture
        need(
            name in ARCHITECTURES,
            f"architecture {name!r} is none of {[*ARCHITECTURES]}",
        )
        for field_name in ("d_sae", "steps", "batch_size"):
            value = getattr(self, field_name)
            need(value >= 1, f"{field_name} must be at least 1, got {value}")
        need(self.lr > 0, f"lr must be positive, got {self.lr}")
        if name in ("topk", "batchtopk", "matryoshka"):
            need(
                0 < self.k <= self.d_sae,
                f"k must lie in 1 … d_sae={self.d_sae}, got {self.k}",
            )
            need(
                self.l1_coefficient == self.l0_coefficient == 0,
                f"{name} sets its sparsity by k; leave l1/l0_coefficient at 0",
            )
        if name == "topk":
            need(self.k == int(self.k), f"TopK needs a whole k, got {self.k}")
        if name in ("l1", "gated"):
            need(self.l1_coefficient > 0, f"{name} needs l1_coefficient > 0")
        if name == "jumprelu":
            need(self.l0_coefficient > 0, "jumprelu needs l0_coefficient > 0")
            need(
                self.bandwidth > 0 and self.threshold >= 0,
                "jumprelu needs bandwidth > 0 and threshold ≥ 0",
            )
        if name == "matryoshka":
            rising = all(
                a < b for a, b in zip(self.widths, self.widths[1:], strict=False)
            )
            need(
                bool(self.widths)
                and rising
                and self.widths[0] > 0
                and self.widths[-1] == self.d_sae,
                f"widths must rise from above 0 to d_sae={self.d_sae}, got {self.widths}",
            )
        else:
            need(not self.widths, f"widths belong to matryoshka, not {name}")
        unknown = set(self.revival) - {"auxk", "ghost", "resample"}
        need(not unknown, f"unknown revival {sorted(unknown)}")
        need(
            ("resample" in self.revival) == bool(self.resample_steps),
            "resample_steps and 'resample' in revival go together",
        )
        need(
            self.warm_up + self.decay <= self.steps,
            f"lr warm-up {self.warm_up} + decay {self.decay} exceed steps {self.steps}",
        )

    @property
    def warm_up(self) -> int:
        """Steps of learning-rate warm-up."""
        return (
            self.steps // 20 if self.lr_warm_up_steps is None else self.lr_warm_up_steps
        )

    @property
    def decay(self) -> int:
        """Steps of learning-rate decay."""
        return self.steps // 5 if self.lr_decay_steps is None else self.lr_decay_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of step 0 … steps − 1."""
        rise = (step + 1) / self.warm_up if self.warm_up else 1.0
        fall = (self.steps - step) / self.decay if self.decay else 1.0
        return self.lr * min(1.0, rise, fall)

    def penalty_at(self, step: int) -> Penalty:
        """The loss of step 0 … steps − 1."""
        rise = (
            self.steps // 10
            if self.sparsity_warm_up_steps is None
            else self.sparsity_warm_up_steps
        )
        coefficient = max(self.l1_coefficient, self.l0_coefficient)
        return Penalty(
            self.architecture,
            self.k,
            coefficient * (min(1.0, (step + 1) / rise) if rise else 1.0),
            self.widths,
            self.bandwidth,
            self.pre_encoder_bias,
            self.encoder_dtype == "bfloat16",
        )


@dataclass
class TrainResult:
    """What training gives back."""

    sae: Any
    """A stock sae_lens SAE that takes raw rows."""
    history: Any
    """DataFrame, a row every `log_every` steps: step, rows, loss, mse and fvu of the
    batch (in scaled units), l0, aux_loss, dead (latents), lr, seconds."""
    config: TrainConfig
    info: dict
    """init_rows, input_scale, threshold, seconds, rows_per_second, interrupted,
    messages (health warnings, as they were shown)."""
    _rows: Any = field(repr=False, default=None)
    _eval_rows: Any = field(repr=False, default=None)

    @cached_property
    def W_dec_init(self) -> Float[Tensor, "d_sae d_in"]:
        """The decoder before the first step, made again from the seed."""
        return _start(self._rows, self.config)[0]["W_dec"]

    @cached_property
    def scorecard(self):
        """`metrics.scorecard` on `eval_rows`, or on the training rows if none."""
        from saeutils import metrics

        held_out = self._eval_rows is not None
        return metrics.scorecard(
            self.sae,
            self._eval_rows if held_out else self._rows,
            init=self.W_dec_init,
            eval_set="held-out rows" if held_out else "training rows",
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
    trainers = [_Trainer(store, c, group) for c in configs]
    saved = [
        f and runs.Run(f, c, store, group.rank)
        for f, c in zip(folders, configs, strict=True)
    ]
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
    finally:
        bar.close()
    results = []
    for trainer, run in zip(trainers, saved, strict=True):
        result = trainer.finish(interrupted)
        result._eval_rows = eval_rows
        if run and group.rank == 0:
            run.save_checkpoint(trainer.state())
            run.save_result(result)
        results.append(result)
    return results


def _start(store, config: TrainConfig) -> tuple[Params, dict, Tensor]:
    """Start values, facts about the data, and the (scaled) rows these came from."""
    n = min(len(store), INIT_ROWS)
    sample = next(
        iter(store.batches(n, seed=config.data_seed, shuffle="full", steps=1))
    ).rows
    sample = sample.to(config.device)
    norm = float(sample.norm(dim=1).double().mean())
    if not norm > 0 or norm == float("inf"):
        raise ValueError(
            f"the mean norm of {n} rows is {norm}: rows must be finite and not all zero"
        )
    scale = store.d_in**0.5 / norm if config.input_scale == "sqrt_d" else 1.0
    sample = sample * scale
    mean = sample.mean(0)
    centre = {
        "mean": lambda: mean,
        "zero": lambda: torch.zeros_like(mean),
        "median": lambda: geometric_median(sample),
    }[config.b_dec_init]()
    directions = None
    if config.decoder_init == "data":
        pick = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
        directions = sample[pick[: config.d_sae].to(sample.device)] - centre
    params = initial_params(
        config.architecture,
        config.d_sae,
        centre,
        seed=config.seed,
        directions=directions,
        encoder_scale=config.encoder_scale,
        threshold=config.threshold,
    )
    variance = float((sample - mean).double().square().sum()) / n
    return params, {"init_rows": n, "input_scale": scale, "variance": variance}, sample


def geometric_median(
    rows: Float[Tensor, "n d"], steps: int = 100
) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows (Weiszfeld's iteration)."""
    point = rows.mean(0)
    for _ in range(steps):
        weight = 1 / (rows - point).norm(dim=1).clamp_min(1e-6)
        new = (weight @ rows) / weight.sum()
        if (new - point).norm() <= 1e-6 * point.norm().clamp_min(1e-6):
            return new
        point = new
    return point


class _Trainer:
    """One SAE in training: parameters, Adam, counters of dead latents, history."""

    def __init__(self, store, config: TrainConfig, group: Group) -> None:
        self.config, self.group, self.store = config, group, store
        self.params, self.info, self.sample = _start(store, config)
        if not config.resample_steps:
            self.sample = None
        group.broadcast_([*self.params.values()])
        self.optimizer = torch.optim.Adam(
            [p.requires_grad_() for p in self.params.values()],
            betas=config.betas,
            fused=True,
        )
        for p in self.params.values():
            p.grad = torch.zeros_like(p)
            self.optimizer.state[p] = {
                "step": torch.zeros((), dtype=torch.float32, device=p.device),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.out = Weights(*(self.params[n].grad for n in Weights._fields))
        self.since_fired = torch.zeros(
            config.d_sae, dtype=torch.int64, device=config.device
        )
        self.done, self.density, self.guess = 0, 1.0, 0.0
        self.history, self.messages, self.seconds = [], [], 0.0
        self._window = None
        self.log_every = config.log_every or max(1, config.steps // 200)
        total = config.steps * config.batch_size
        self.dead_after = config.dead_after or max(config.batch_size, total // 20)
        self.k_aux = config.k_aux or max(1, store.d_in // 2)

    @property
    def dead(self) -> Tensor:
        """Indices of dead latents."""
        return (self.since_fired >= self.dead_after).nonzero().squeeze(1)

    def step(self, rows: Tensor, index: Tensor) -> dict | None:
        """One step of gradient descent; a row of the history when one is due."""
        began, config, step = time.perf_counter(), self.config, self.done
        x = rows.to(config.device) * self.info["input_scale"]
        penalty = config.penalty_at(step)
        out = self._objective(x, penalty)
        dead, aux_loss = self.dead, 0.0
        if len(dead):
            centred = x - self.params["b_dec"] if config.pre_encoder_bias else x
            shared = dict(
                batch=config.batch_size, encoder_centred=config.pre_encoder_bias
            )
            if "auxk" in config.revival:
                aux_loss += revival.add_auxk(
                    self.out,
                    self.params,
                    dead,
                    centred,
                    out.error,
                    k_aux=self.k_aux,
                    coefficient=config.aux_coefficient,
                    **shared,
                )
            if "ghost" in config.revival:
                aux_loss += revival.add_ghost(
                    self.out, self.params, dead, centred, out.error, **shared
                )
        totals = torch.tensor(
            [out.loss + aux_loss, out.mse, aux_loss], dtype=torch.float64
        )
        counts = out.counts
        if self.group.world_size > 1:
            self.group.sum_([*(p.grad for p in self.params.values()), counts])
            totals = totals.to(config.device)
            self.group.sum_([totals])
        loss, mse, aux_loss = totals.tolist()
        if not loss < float("inf"):
            self._refuse(step, loss, rows, index)
        self._descend(step)
        self.since_fired += config.batch_size
        self.since_fired[counts > 0] = 0
        self.density = float(counts.sum()) / (config.batch_size * config.d_sae)
        if out.cut > 0:
            self.guess = 0.9 * out.cut
        self._window = counts if self._window is None else self._window + counts
        self.done += 1
        if self.done in config.resample_steps:
            self._resample()
        self.seconds += time.perf_counter() - began
        if self.done % self.log_every and self.done < config.steps:
            return None
        return self._log(loss, mse, aux_loss, step)

    def _objective(self, x: Tensor, penalty: Penalty) -> StepOutput:
        sparse = penalty.architecture != "gated" and (
            penalty.architecture in ("topk", "batchtopk", "matryoshka")
            or self.density < SPARSE_BELOW
        )
        batch = self.config.batch_size
        if sparse:
            out = objectives.sparse_step(
                self.params,
                x,
                penalty,
                batch=batch,
                guess=self.guess,
                gather=self.group.gather,
                out=self.out,
            )
        else:
            out = objectives.dense_step(self.params, x, penalty, batch=batch)
        for name, grad in out.grads.items():
            if grad is not self.params[name].grad:
                self.params[name].grad.copy_(grad)
        return out

    def _descend(self, step: int) -> None:
        W_dec = self.params["W_dec"]
        if self.config.remove_parallel_grad and self.config.unit_norm_decoder:
            along = torch.linalg.vecdot(W_dec.grad, W_dec).unsqueeze(1)
            W_dec.grad.addcmul_(along, W_dec, value=-1)
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(
                [*self.params.values()], self.config.grad_clip
            )
        self.optimizer.param_groups[0]["lr"] = self.config.lr_at(step)
        self.optimizer.step()
        if self.config.unit_norm_decoder:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
        if "threshold" in self.params:
            self.params["threshold"].clamp_(min=0)

    def _resample(self) -> None:
        if not len(self.dead):
            return
        penalty = self.config.penalty_at(self.done)
        step = (
            objectives.sparse_step
            if penalty.architecture != "gated"
            else objectives.dense_step
        )
        error = step(self.params, self.sample, penalty).error
        state = self.optimizer.state
        moments = [
            {n: state[p][m] for n, p in self.params.items()}
            for m in ("exp_avg", "exp_avg_sq")
        ]
        generator = torch.Generator().manual_seed(
            self.config.seed * 1_000_003 + self.done
        )
        centred = (
            self.sample - self.params["b_dec"]
            if self.config.pre_encoder_bias
            else self.sample
        )
        revival.resample(
            self.params, moments, self.dead, centred, error.square().sum(1), generator
        )
        self.since_fired[self.dead] = 0

    def _refuse(self, step: int, loss: float, rows: Tensor, index: Tensor) -> None:
        bad = index[~rows.isfinite().all(1)].tolist()
        what = (
            f"rows {bad[:5]} of the data hold NaN or Inf"
            if bad
            else f"the rows are finite, so training diverged: lower lr={self.config.lr}"
        )
        raise FloatingPointError(
            f"loss is {loss} at step {step} (batch of rows {index[:5].tolist()} …): {what}. "
            "The parameters are those before this step."
        )

    def _log(self, loss: float, mse: float, aux_loss: float, step: int) -> dict:
        steps = (self.done - 1) % self.log_every + 1
        n_rows = steps * self.config.batch_size
        window, self._window = self._window, None
        row = {
            "step": self.done,
            "rows": self.done * self.config.batch_size,
            "loss": loss,
            "mse": mse,
            "fvu": mse / self.info["variance"],
            "l0": float(window.sum()) / n_rows,
            "aux_loss": aux_loss,
            "dead": len(self.dead),
            "lr": self.config.lr_at(step),
            "seconds": self.seconds,
        }
        self.history.append(row)
        varies = ((window > 0) & (window < n_rows)).any()
        if row["l0"] < 1e-3 or not varies:
            self._warn(
                "collapse",
                f"step {self.done}: L0 is {row['l0']:.3g} and no latent "
                "tells rows apart: the codes have collapsed (sparsity too high?)",
            )
        return row

    def _warn(self, kind: str, message: str) -> None:
        if not any(m["kind"] == kind for m in self.messages):
            self.messages.append({"kind": kind, "step": self.done, "message": message})
            warnings.warn(message, stacklevel=2)

    def finish(self, interrupted: bool) -> TrainResult:
        """Export what is trained so far."""
        import pandas as pd

        threshold = 0.0
        if self.config.architecture in ("batchtopk", "matryoshka"):
            threshold = self._inference_threshold()
        rate = (
            self.done * self.config.batch_size / self.seconds if self.seconds else 0.0
        )
        info = self.info | {
            "threshold": threshold / self.info["input_scale"],
            "steps": self.done,
            "seconds": self.seconds,
            "rows_per_second": rate,
            "interrupted": interrupted,
            "messages": self.messages,
        }
        metadata = {"saeutils_config": asdict(self.config), "saeutils_info": info}
        params = {n: p.detach() for n, p in self.params.items()}
        sae = export(
            params,
            self.config.architecture,
            k=self.config.k,
            input_scale=self.info["input_scale"],
            threshold=threshold,
            pre_encoder_bias=self.config.pre_encoder_bias,
            metadata=metadata,
        )
        return TrainResult(
            sae, pd.DataFrame(self.history), self.config, info, self.store
        )

    def _inference_threshold(self) -> float:
        """The value that k · n of the latents of n rows lie at or above, exactly."""
        n = min(len(self.store), THRESHOLD_ROWS)
        size = self.config.batch_size
        weights = Weights(*(self.params[name].detach() for name in Weights._fields))

        def encode():
            batches = self.store.batches(
                min(size, n), seed=self.config.data_seed + 1, steps=max(1, n // size)
            )
            for batch in batches:
                x = batch.rows.to(self.config.device) * self.info["input_scale"]
                centred = x - weights.b_dec if self.config.pre_encoder_bias else x
                yield from kernels.encode_chunks(
                    centred, weights.W_enc_T, weights.b_enc
                )

        total = int(self.config.k * min(size, n) * max(1, n // size))
        codes, cut = kernels.select_batch_topk(encode, total, self.guess)
        # JumpReLU fires above its threshold, so step just below the smallest kept
        return float(torch.tensor(cut).nextafter(torch.tensor(0.0)))

    def state(self) -> runs.Checkpoint:
        """Everything that the next step depends on."""
        state = self.optimizer.state
        tensors = {f"params.{n}": p for n, p in self.params.items()}
        tensors |= {
            f"{m}.{n}": state[p][m]
            for n, p in self.params.items()
            for m in ("exp_avg", "exp_avg_sq")
        }
        tensors["since_fired"] = self.since_fired
        if self._window is not None:
            tensors["window"] = self._window
        scalars = {
            "done": self.done,
            "density": self.density,
            "guess": self.guess,
            "history": self.history,
            "messages": self.messages,
            "seconds": self.seconds,
            "info": self.info,
        }
        return runs.Checkpoint({n: t.detach() for n, t in tensors.items()}, scalars)

    def load(self, checkpoint: runs.Checkpoint) -> None:
        """Go on where `state` was taken."""
        tensors = checkpoint.tensors
        for n, p in self.params.items():
            p.copy_(tensors[f"params.{n}"])
            state = self.optimizer.state[p]
            state["step"].fill_(checkpoint.scalars["done"])
            for m in ("exp_avg", "exp_avg_sq"):
                state[m].copy_(tensors[f"{m}.{n}"])
        self.since_fired.copy_(tensors["since_fired"])
        self._window = tensors.get("window")
        for name in (
            "done",
            "density",
            "guess",
            "history",
            "messages",
            "seconds",
            "info",
        ):
            setattr(self, name, checkpoint.scalars[name])


def _describe(configs: Sequence[TrainConfig]) -> str:
    if len(configs) > 1:
        return f"{len(configs)} SAEs"
    return f"{configs[0].architecture} {configs[0].d_sae}"
