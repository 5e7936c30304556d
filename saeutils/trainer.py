"""One SAE in training: a step of gradient descent, revival, health, state.

`training` feeds it batches; `objectives` computes loss and gradients.
"""

import time
import warnings
from dataclasses import asdict

import torch
from jaxtyping import Float
from torch import Tensor

from saeutils import kernels, objectives, revival, runs
from saeutils.distributed import Group
from saeutils.kernels import Weights
from saeutils.objectives import Penalty, StepOutput
from saeutils.sae import (
    Params,
    export,
    fold_decoder_norm,
    initial_params,
    unfold_gradients,
)
from saeutils.train_config import TrainConfig

INIT_ROWS = 16_384  # rows that b_dec, the input scale and the variance are taken from
THRESHOLD_ROWS = 65_536  # rows that BatchTopK's inference threshold is taken from
SPARSE_BELOW = 1 / 16  # density of latents under which the sparse step pays


def start_values(store, config: TrainConfig) -> tuple[Params, dict, Tensor]:
    """Start values, facts about the data, and the (scaled) rows these came from."""
    n = min(len(store), INIT_ROWS)
    first = next(iter(store.batches(n, seed=config.data_seed, steps=1)))
    bad = first.index[~first.rows.isfinite().all(1)]
    if len(bad):
        raise ValueError(
            f"rows {bad[:5].tolist()} of the data hold NaN or Inf ({len(bad):,} of "
            f"{n:,} rows looked at): leave them out"
        )
    sample = first.rows.to(config.device)
    norm = float(sample.norm(dim=1).double().mean())
    if not norm > 0:
        raise ValueError(f"the {n:,} rows looked at are all zero")
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
        tied=config.encoder_init == "tied",
        encoder_scale=config.encoder_scale,
        threshold=config.threshold,
    )
    for name in ("W_dec", "W_enc_T"):
        params[name] *= config.init_norm
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


class Trainer:
    """One SAE in training: parameters, Adam, counters of dead latents, history."""

    def __init__(self, store, config: TrainConfig, group: Group) -> None:
        self.config, self.group, self.store = config, group, store
        self.params, self.info, self.sample = start_values(store, config)
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

    def effective_params(self) -> Params:
        """The parameters as loss and export see them."""
        params = {n: p.detach() for n, p in self.params.items()}
        if self.config.decoder_norm == "folded":
            params = fold_decoder_norm(params)
        return params

    def step(self, rows: Tensor, index: Tensor) -> dict | None:
        """One step of gradient descent; a row of the history when one is due."""
        began, config, step = time.perf_counter(), self.config, self.done
        x = rows.to(config.device) * self.info["input_scale"]
        penalty = config.penalty_at(step)
        params = self.effective_params()
        out = self._objective(params, x, penalty)
        dead, aux_loss = self.dead, 0.0
        if len(dead):
            centred = self._centred(params, x)
            shared = dict(
                batch=config.batch_size, encoder_centred=config.pre_encoder_bias
            )
            if "auxk" in config.revival:
                aux_loss += revival.add_auxk(
                    self.out,
                    params,
                    dead,
                    centred,
                    out.error,
                    k_aux=self.k_aux,
                    coefficient=config.aux_coefficient,
                    **shared,
                )
            if "ghost" in config.revival:
                aux_loss += revival.add_ghost(
                    self.out, params, dead, centred, out.error, **shared
                )
        if config.decoder_norm == "folded":
            grads = {n: p.grad for n, p in self.params.items()}
            unfold_gradients(self.params, params, grads)
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

    def _centred(self, params: Params, x: Tensor) -> Tensor:
        """What the encoder sees of x."""
        return x - params["b_dec"] if self.config.pre_encoder_bias else x

    def _objective(self, params: Params, x: Tensor, penalty: Penalty) -> StepOutput:
        batch = self.config.batch_size
        if self._sparse_pays:
            out = objectives.sparse_step(
                params,
                x,
                penalty,
                batch=batch,
                guess=self.guess,
                gather=self.group.gather,
                out=self.out,
            )
        else:
            out = objectives.dense_step(params, x, penalty, batch=batch)
        for name, grad in out.grads.items():
            if grad is not self.params[name].grad:
                self.params[name].grad.copy_(grad)
        return out

    @property
    def _sparse_pays(self) -> bool:
        name = self.config.architecture
        if name in ("l1", "jumprelu"):
            return self.density < SPARSE_BELOW
        return name != "gated"

    def _descend(self, step: int) -> None:
        W_dec = self.params["W_dec"]
        unit = self.config.decoder_norm == "unit"
        if unit and self.config.remove_parallel_grad:
            along = torch.linalg.vecdot(W_dec.grad, W_dec).unsqueeze(1)
            W_dec.grad.addcmul_(along, W_dec, value=-1)
        if self.config.grad_clip:
            torch.nn.utils.clip_grad_norm_(
                [*self.params.values()], self.config.grad_clip
            )
        self.optimizer.param_groups[0]["lr"] = self.config.lr_at(step)
        self.optimizer.step()
        if unit:
            W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))
        if "threshold" in self.params:
            self.params["threshold"].clamp_(min=0)

    def _resample(self) -> None:
        if not len(self.dead):
            return
        penalty = self.config.penalty_at(self.done)
        params = self.effective_params()
        if self._sparse_pays:  # every process has the whole sample: nothing to gather
            out = objectives.sparse_step(params, self.sample, penalty, guess=self.guess)
        else:
            out = objectives.dense_step(params, self.sample, penalty)
        state = self.optimizer.state
        moments = [
            {n: state[p][m] for n, p in self.params.items()}
            for m in ("exp_avg", "exp_avg_sq")
        ]
        generator = torch.Generator().manual_seed(
            self.config.seed * 1_000_003 + self.done
        )
        revival.resample(
            self.params,
            moments,
            self.dead,
            self._centred(params, self.sample),
            out.error.square().sum(1),
            generator,
            self.config.resample_length,
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
            f"loss is {loss} at step {step} (batch of rows {index[:5].tolist()} …): "
            f"{what}. "
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
        if 2 * row["dead"] > self.config.d_sae and 2 * self.done >= self.config.steps:
            self._warn(
                "dead",
                f"step {self.done}: {row['dead']} of {self.config.d_sae} latents have "
                f"not fired on the last {self.dead_after:,} rows",
            )
        return row

    def _warn(self, kind: str, message: str) -> None:
        if not any(m["kind"] == kind for m in self.messages):
            self.messages.append({"kind": kind, "step": self.done, "message": message})
            warnings.warn(message, stacklevel=2)

    def finish(self, interrupted: bool):
        """(sae, history, info) of what is trained so far."""
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
        params = self.effective_params()
        sae = export(
            params,
            self.config.architecture,
            k=self.config.k,
            input_scale=self.info["input_scale"],
            threshold=threshold,
            pre_encoder_bias=self.config.pre_encoder_bias,
            metadata=metadata,
        )
        return sae, pd.DataFrame(self.history), info

    def _inference_threshold(self) -> float:
        """The value that k · n of the latents of n rows lie at or above, exactly."""
        n = min(len(self.store), THRESHOLD_ROWS)
        size = self.config.batch_size
        params = self.effective_params()
        weights = Weights(*(params[name] for name in Weights._fields))

        def encode():
            batches = self.store.batches(
                min(size, n), seed=self.config.data_seed + 1, steps=max(1, n // size)
            )
            for batch in batches:
                x = batch.rows.to(self.config.device) * self.info["input_scale"]
                centred = self._centred(params, x)
                yield from kernels.encode_chunks(
                    centred, weights.W_enc_T, weights.b_enc
                )

        total = int(self.config.k * min(size, n) * max(1, n // size))
        _codes, cut = kernels.select_batch_topk(encode, total, self.guess)
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
