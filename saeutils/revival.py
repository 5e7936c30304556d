"""Ways to bring dead latents back: AuxK, ghost gradients, resampling.

A latent is dead when it has not fired on the last `dead_after` training rows. All
three work on the gathered rows of dead latents only.

AuxK (Gao et al. 2024, arXiv 2406.04093, A.2). The k_aux strongest dead latents
reconstruct what the living ones left over, with no bias and no gradient into it:
    e = x − x̂ (detached),   ê = z_aux W_dec,   loss = α · s · mean‖ê − e‖²,
with s = min(1, dead / k_aux), so that a handful of dead latents is not pushed hard.

Ghost gradients (Jermyn & Templeton 2024). Dead latents fire as exp(pre), their
output is scaled to half the norm of e, and its loss to the size of the main one;
both scales are held constant in the gradient.

Resampling (Bricken et al. 2023, "Towards Monosemanticity"). At set steps a dead
latent becomes the direction of a row drawn with probability ∝ loss², its encoder
a fifth as long as the living ones', its bias 0, its Adam moments 0. For TopK and
BatchTopK a fifth is too short: such a latent is hardly ever among the k largest.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saeutils import kernels
from saeutils.kernels import Weights
from saeutils.sae import Params


def add_auxk(
    grads: Weights,
    params: Params,
    dead: Int[Tensor, " n_dead"],
    centred: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    *,
    k_aux: int,
    coefficient: int | float,
    batch: int,
    encoder_centred: bool = True,
) -> float:
    """Add AuxK's gradients to `grads` in place; returns the loss of these rows.

    Args:
        dead: latents to revive.
        centred: what the encoder sees.
        error: e = x − x̂ of the main reconstruction.
        batch: number of rows of the mean, over all processes.
    """
    n_dead = len(dead)
    weight = coefficient * min(1.0, n_dead / k_aux) / batch
    W_enc_T, b_enc = params["W_enc_T"][dead], params["b_enc"][dead]
    W_dec = params["W_dec"][dead]
    grad_enc, grad_dec = torch.zeros_like(W_enc_T), torch.zeros_like(W_dec)
    grad_bias, loss = torch.zeros_like(b_enc), 0.0
    for start, pre in kernels.encode_chunks(centred, W_enc_T, b_enc):
        rows = slice(start, start + len(pre))
        if n_dead > k_aux:
            chosen = kernels.select_topk([(0, pre)], k_aux, positive=False)
            mask = torch.zeros_like(pre)
            mask[chosen.rows, chosen.indices.long()] = 1
            pre *= mask
        miss = pre @ W_dec - error[rows]
        loss += weight * float(miss.double().square().sum())
        grad_pre = 2 * weight * (miss @ W_dec.T)
        if n_dead > k_aux:
            grad_pre *= mask
        grad_dec.addmm_(pre.T, miss, alpha=2 * weight)
        grad_enc.addmm_(grad_pre.T, centred[rows])
        grad_bias += grad_pre.sum(0)
    _add(grads, dead, grad_enc, grad_bias, grad_dec)
    if encoder_centred:
        grads.b_dec.addmv_(W_enc_T.T, grad_bias, alpha=-1)
    return loss


def add_ghost(
    grads: Weights,
    params: Params,
    dead: Int[Tensor, " n_dead"],
    centred: Float[Tensor, "batch d_in"],
    error: Float[Tensor, "batch d_in"],
    *,
    batch: int,
    encoder_centred: bool = True,
) -> float:
    """Add ghost gradients to `grads` in place; returns the loss of these rows."""
    leaves = [params[n][dead].requires_grad_() for n in ("W_enc_T", "b_enc", "W_dec")]
    loss = 0.0
    size = max(64, kernels.CHUNK_BYTES // (len(dead) * centred.element_size()))
    for start in range(0, len(centred), size):
        x, e = centred[start : start + size], error[start : start + size]
        with torch.enable_grad():
            W_enc_T, b_enc, W_dec = leaves
            ghost = torch.exp(x @ W_enc_T.T + b_enc) @ W_dec
            norms = e.norm(dim=1), ghost.detach().norm(dim=1).clamp_min(1e-8)
            ghost = ghost * (norms[0] / (2 * norms[1])).unsqueeze(1)
            each = (ghost - e).square().sum(1)
            main = e.square().sum(1)
            part = (each * (main / each.detach().clamp_min(1e-8))).sum() / batch
            part.backward()
        loss += float(part.detach())
    _add(grads, dead, leaves[0].grad, leaves[1].grad, leaves[2].grad)
    if encoder_centred:
        grads.b_dec.addmv_(leaves[0].detach().T, leaves[1].grad, alpha=-1)
    return loss


def resample(
    params: Params,
    moments: list[Params],
    dead: Int[Tensor, " n_dead"],
    centred: Float[Tensor, "n d_in"],
    losses: Float[Tensor, " n"],
    generator: torch.Generator,
    length: int | float = 0.2,
) -> None:
    """Turn dead latents into rows that the SAE reconstructs badly, in place.

    Args:
        moments: Adam's first and second moments, keyed like `params`; the dead
            latents' are set to 0.
        centred: rows to draw from, as the encoder sees them.
        losses: squared error of each of these rows.
        length: of their encoders, in mean lengths of the living ones'.
    """
    weight = losses.double().square().cpu()
    n = min(len(dead), int((weight > 0).sum()))
    dead = dead[:n]
    if n == 0:
        return
    drawn = torch.multinomial(weight, n, generator=generator).to(centred.device)
    direction = torch.nn.functional.normalize(centred[drawn], dim=1)
    alive = torch.ones(len(params["b_enc"]), dtype=torch.bool, device=dead.device)
    alive[dead] = False
    norms = params["W_enc_T"].norm(dim=1)
    unit = norms[alive].mean() if alive.any() else norms.mean()
    size = params["W_dec"].norm(dim=1)[alive if alive.any() else ~alive].mean()
    params["W_dec"][dead] = size * direction
    params["W_enc_T"][dead] = length * unit * direction
    params["b_enc"][dead] = 0
    for moment in moments:
        for name in ("W_dec", "W_enc_T", "b_enc"):
            moment[name][dead] = 0


def _add(grads: Weights, dead, enc, bias, dec) -> None:
    grads.W_enc_T.index_add_(0, dead, enc)
    grads.b_enc.index_add_(0, dead, bias)
    grads.W_dec.index_add_(0, dead, dec)
