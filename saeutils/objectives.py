"""The loss of every SAE architecture and its gradients, on one batch.

With c = x − b_dec (or x, without the pre-encoder bias), pre = c W_enc + b_enc and
x̂ = z W_dec + b_dec, the loss is a mean over rows; every term is a sum over
dimensions or latents of one row, so they share one normalisation:

    TopK        z = relu(top k of pre in the row)           ‖x − x̂‖²
    BatchTopK   z = relu(top k·batch of pre in the batch)   ‖x − x̂‖²
    Matryoshka  z as BatchTopK; x̂_m uses latents < width m   Σ_m ‖x − x̂_m‖²
    L1          z = relu(pre)                ‖x − x̂‖² + λ Σ_j z_j ‖W_dec[j]‖
    JumpReLU    z = pre · 1[pre > θ]         ‖x − x̂‖² + λ Σ_j 1[pre_j > θ_j]
    Gated       z = relu(c W_enc e^r + b_mag) · 1[pre > 0]
                ‖x − x̂‖² + λ Σ_j relu(pre_j) ‖W_dec[j]‖ + ‖x − relu(pre) W_dec − b_dec‖²

Sources: Gao et al. 2024 (TopK), Bussmann et al. 2024 and 2025 (BatchTopK,
Matryoshka), Bricken et al. 2023 (L1), Rajamanoharan et al. 2024a, b (Gated, JumpReLU;
the step's gradient is a rectangle of the given bandwidth).

Two ways to the same gradients. `sparse_step` never builds (batch, d_sae) latents:
see `kernels`. `dense_step` is plain autograd in chunks of rows: the reference for
the tests, and what a ReLU SAE needs in its first steps, when half of its latents fire.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeutils import kernels
from saeutils.kernels import Weights
from saeutils.sae import Params


class Penalty(NamedTuple):
    """What an architecture needs beside its weights."""

    architecture: str
    k: int | float = 0
    coefficient: int | float = 0.0
    """λ of L1, JumpReLU and Gated."""
    widths: tuple[int, ...] = ()
    """Matryoshka's nested widths, rising, the last one d_sae."""
    bandwidth: int | float = 0.05
    """JumpReLU's rectangle."""
    pre_encoder_bias: bool = True
    low_precision: bool = False


class StepOutput(NamedTuple):
    """Gradients and statistics of one batch."""

    grads: Params
    """∂loss/∂parameter, keyed and shaped like the parameters."""
    loss: float
    mse: float
    """Mean over rows of ‖x − x̂‖²."""
    counts: Int[Tensor, " d_sae"]
    """On how many rows each latent fired."""
    error: Float[Tensor, "batch d_in"]
    """x − x̂."""
    cut: float
    """BatchTopK's exact threshold on this batch; 0 for the others."""


def sparse_step(
    params: Params,
    x: Float[Tensor, "batch d_in"],
    penalty: Penalty,
    *,
    batch: int | None = None,
    guess: int | float = 0.0,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
    out: Weights | None = None,
) -> StepOutput:
    """Loss and gradients without dense latents; every architecture but Gated.

    Args:
        batch: rows of the mean over all processes; default len(x).
        guess: for BatchTopK, a threshold a little below the exact one.
        gather: for BatchTopK, joins the candidates of all processes.
        out: where to write the gradients.
    """
    batch = batch or len(x)
    weights = _weights(params)
    centred = x - params["b_dec"] if penalty.pre_encoder_bias else x
    name, cut, active, extra = penalty.architecture, 0.0, None, 0.0

    def encode():
        return kernels.encode_chunks(
            centred, weights.W_enc_T, weights.b_enc, penalty.low_precision
        )

    if name == "topk":
        codes = kernels.select_topk(encode(), int(penalty.k))
    elif name in ("batchtopk", "matryoshka"):
        total = int(penalty.k * batch)
        codes, cut = kernels.select_batch_topk(encode, total, guess, gather)
    elif name == "l1":
        codes = kernels.select_above(encode(), 0.0)
    elif name == "jumprelu":
        # the rectangle below the threshold has a gradient too
        floor = (params["threshold"] - penalty.bandwidth / 2).clamp_min(0)
        codes = kernels.select_above(encode(), floor)
        latents = codes.indices.long()
        theta, near_pre = params["threshold"][latents], codes.values
        active = near_pre > theta
        codes = codes._replace(values=near_pre * active)
    else:
        raise ValueError(f"{name} has no sparse step")

    widths = penalty.widths if name == "matryoshka" else ()
    forward = kernels.reconstruct(codes, weights.W_dec, weights.b_dec, x, widths)
    grad_values = forward.dot * (2 / batch)
    grads = {}
    if name == "jumprelu":
        near = (near_pre - theta).abs() < penalty.bandwidth / 2
        slope = near / penalty.bandwidth
        each = -slope * (theta * grad_values + penalty.coefficient / batch)
        grads["threshold"] = torch.zeros_like(params["threshold"])
        grads["threshold"].index_add_(0, latents, each)
        grad_values = grad_values * active
        extra = penalty.coefficient * int(active.sum()) / batch
    if name == "l1":
        norms = weights.W_dec.norm(dim=1)
        latents = codes.indices.long()
        rate = penalty.coefficient / batch
        grad_values = grad_values + rate * norms[latents]
        extra = rate * float((codes.values * norms[latents]).double().sum())
    out = kernels.gradients(
        codes,
        grad_values,
        forward.residual,
        2 / batch,
        centred,
        weights,
        widths,
        penalty.pre_encoder_bias,
        out,
    )
    if name == "l1":  # ∂‖W_dec[j]‖/∂W_dec[j]
        mass = torch.zeros_like(norms).index_add_(0, latents, codes.values)
        factor = rate * mass / norms.clamp_min(1e-12)
        out.W_dec.addcmul_(factor.unsqueeze(1), weights.W_dec)
    fired = codes.indices if active is None else codes.indices[active]
    counts = torch.bincount(fired, minlength=len(weights.b_enc))
    return StepOutput(
        grads=out._asdict() | grads,
        loss=float(forward.squared_error.sum()) / batch + extra,
        mse=float(forward.squared_error[-1]) / batch,
        counts=counts,
        error=-forward.residual[-1],
        cut=cut,
    )


def dense_step(
    params: Params,
    x: Float[Tensor, "batch d_in"],
    penalty: Penalty,
    *,
    batch: int | None = None,
) -> StepOutput:
    """The same by autograd over dense latents; BatchTopK wants the batch in one."""
    batch = batch or len(x)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in params.items()}
    whole = penalty.architecture in ("batchtopk", "matryoshka")
    d_sae = len(params["b_enc"])
    size = len(x) if whole else max(64, kernels.CHUNK_BYTES // (d_sae * 4))
    loss = mse = cut = 0.0
    counts, error = 0, torch.empty_like(x)
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        with torch.enable_grad():
            out = _dense_loss(leaves, rows, penalty)
            (out.loss / batch).backward()
        loss += float(out.loss.detach()) / batch
        error[start : start + size] = rows - out.reconstruction.detach()
        mse += float(error[start : start + size].double().square().sum()) / batch
        counts = counts + (out.latents.detach() > 0).sum(0)
    if whole and (out.latents > 0).any():
        cut = float(out.latents.detach()[out.latents > 0].min())
    grads = {n: p.grad for n, p in leaves.items()}
    return StepOutput(grads, loss, mse, counts, error, cut)


class _Dense(NamedTuple):
    loss: Tensor
    reconstruction: Tensor
    latents: Tensor


def _dense_loss(p: Params, x: Tensor, penalty: Penalty) -> _Dense:
    """Sum over rows of the loss in this module's docstring, letter by letter."""
    name = penalty.architecture
    W_enc, norms = p["W_enc_T"].T, p["W_dec"].norm(dim=1)
    c = x - p["b_dec"] if penalty.pre_encoder_bias else x
    pre = c @ W_enc + p["b_enc"]
    loss = 0.0
    if name == "topk":
        top = pre.topk(int(penalty.k), dim=1)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    elif name in ("batchtopk", "matryoshka"):
        flat = pre.relu().flatten()
        top = flat.topk(min(len(flat), int(penalty.k * len(x))))
        z = torch.zeros_like(flat).scatter(0, top.indices, top.values)
        z = z.reshape(pre.shape)
    elif name == "l1":
        z = pre.relu()
        loss = penalty.coefficient * (z * norms).sum()
    elif name == "jumprelu":
        z, fires = _Jump.apply(pre, p["threshold"], penalty.bandwidth)
        loss = penalty.coefficient * fires.sum()
    else:
        gate = pre.relu()
        z = (c @ (W_enc * p["r_mag"].exp()) + p["b_mag"]).relu() * (pre > 0)
        loss = penalty.coefficient * (gate * norms).sum()
        loss = loss + (x - gate @ p["W_dec"] - p["b_dec"]).square().sum()
    widths = penalty.widths if name == "matryoshka" else (len(norms),)
    for width in widths:
        reconstruction = z[:, :width] @ p["W_dec"][:width] + p["b_dec"]
        loss = loss + (x - reconstruction).square().sum()
    return _Dense(loss, reconstruction, z)


class _Jump(torch.autograd.Function):
    """pre ↦ (pre · 1[pre > θ], 1[pre > θ]); θ's gradient through a rectangle."""

    @staticmethod
    def forward(ctx, pre, theta, bandwidth):
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        fires = (pre > theta).to(pre)
        return pre * fires, fires

    @staticmethod
    def backward(ctx, grad_z, grad_fires):
        pre, theta = ctx.saved_tensors
        near = ((pre - theta).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        grad_theta = -(near * (theta * grad_z + grad_fires)).sum(0)
        return grad_z * (pre > theta), grad_theta, None


def _weights(params: Params) -> Weights:
    return Weights(*(params[name] for name in Weights._fields))
