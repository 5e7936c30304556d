"""SAE parameters: start values, export to sae_lens classes, save and load.

While an SAE trains, its parameters are a plain dict of tensors (`Params`), latents
first, so that a latent is one contiguous row of encoder and decoder:

    W_enc_T (d_sae, d_in)   b_enc (d_sae)   W_dec (d_sae, d_in)   b_dec (d_in)
    threshold (d_sae)       JumpReLU only
    r_mag, b_mag (d_sae)    Gated only; its b_enc is the gate's bias

A finished SAE is a stock sae_lens object (`export`), and on disk it is sae_lens'
own format: `cfg.json` and `sae_weights.safetensors`. `SAE.load_from_disk` of an
unmodified sae_lens opens it.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saeutils.kernels import Codes, encode_chunks, select_above, select_topk
from saeutils.streaming import firings

Params = dict[str, Tensor]

#: our name → name of the sae_lens class that holds the finished SAE
ARCHITECTURES = {
    "l1": "standard",
    "topk": "topk",
    "batchtopk": "jumprelu",
    "matryoshka": "jumprelu",
    "jumprelu": "jumprelu",
    "gated": "gated",
}


def initial_params(
    architecture: str,
    d_sae: int,
    b_dec: Float[Tensor, " d_in"],
    *,
    seed: int = 0,
    directions: Float[Tensor, "n d_in"] | None = None,
    tied: bool = True,
    encoder_scale: int | float = 1.0,
    threshold: int | float = 0.0,
) -> Params:
    """Unit-norm decoder rows, encoder tied to them (or not), biases at zero.

    Args:
        b_dec: start value of the decoder bias, e.g. the data's mean.
        seed: of the decoder's Gaussian directions; drawn on the CPU in float32, so
            the same on every device.
        directions: take decoder rows from these vectors (data-point
            initialisation) as far as they reach, Gaussian for the rest.
        tied: W_enc = encoder_scale · W_decᵀ; else Gaussian directions of its own,
            as long. The decoder is the same in both cases.
        encoder_scale: length of the encoder's vectors.
        threshold: JumpReLU's start threshold.
    """
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, len(b_dec), generator=generator)
    if directions is not None:
        n = min(d_sae, len(directions))
        W_dec[:n] = directions[:n].to(W_dec)
    W_dec = torch.nn.functional.normalize(W_dec, dim=1).to(b_dec)
    W_enc_T = W_dec
    if not tied:
        W_enc_T = torch.randn(d_sae, len(b_dec), generator=generator).to(b_dec)
        W_enc_T = torch.nn.functional.normalize(W_enc_T, dim=1)
    zeros = W_dec.new_zeros(d_sae)
    params = {
        "W_enc_T": encoder_scale * W_enc_T,
        "b_enc": zeros.clone(),
        "W_dec": W_dec.clone(),
        "b_dec": b_dec.clone(),
    }
    if architecture == "jumprelu":
        params["threshold"] = torch.full_like(zeros, threshold)
    if architecture == "gated":
        params |= {"r_mag": zeros.clone(), "b_mag": zeros.clone()}
    return params


@torch.no_grad()
def fold_decoder_norm(params: Params) -> Params:
    """The same SAE with unit-norm decoder rows: W_dec[j] / n_j, encoder · n_j.

    With n_j = ‖W_dec[j]‖, latent j becomes n_j z_j: its encoder and its biases are
    multiplied by n_j. Parameters that do not scale are shared, not copied.
    """
    norms = params["W_dec"].norm(dim=1).clamp_min(1e-12)
    folded = params | {
        "W_dec": params["W_dec"] / norms.unsqueeze(1),
        "W_enc_T": params["W_enc_T"] * norms.unsqueeze(1),
        "b_enc": params["b_enc"] * norms,
    }
    if "b_mag" in params:
        folded["b_mag"] = params["b_mag"] * norms
    return folded


@torch.no_grad()
def unfold_gradients(params: Params, folded: Params, grads: Params) -> None:
    """From gradients of `fold_decoder_norm(params)` to those of `params`, in place.

    With u = W_dec[j] / n_j:  ∂L/∂n_j = ∂L/∂W'_enc[j] · W_enc[j] + ∂L/∂b'_j b_j,
    ∂L/∂W_dec[j] = (∂L/∂u − (∂L/∂u · u) u) / n_j + ∂L/∂n_j u.
    """
    norms = params["W_dec"].norm(dim=1).clamp_min(1e-12)
    grad_norm = torch.linalg.vecdot(grads["W_enc_T"], params["W_enc_T"])
    for name in ("b_enc", "b_mag"):
        if name in params:
            grad_norm += grads[name] * params[name]
            grads[name].mul_(norms)
    grads["W_enc_T"].mul_(norms.unsqueeze(1))
    along = torch.linalg.vecdot(grads["W_dec"], folded["W_dec"])
    grads["W_dec"].div_(norms.unsqueeze(1))
    grads["W_dec"].addcmul_((grad_norm - along / norms).unsqueeze(1), folded["W_dec"])


@torch.no_grad()
def export(
    params: Params,
    architecture: str,
    *,
    k: int | float = 0,
    input_scale: int | float = 1.0,
    threshold: int | float | Tensor = 0.0,
    pre_encoder_bias: bool = True,
    metadata: dict | None = None,
):
    """A stock sae_lens SAE with these parameters, for RAW rows.

    An SAE trained on x · input_scale becomes one for x by dividing every bias and
    threshold by input_scale: all our architectures are homogeneous. W_enc and the
    unit-norm W_dec stay as they are, so latents come out in the units of x.

    Args:
        k: of TopK.
        threshold: of BatchTopK and Matryoshka, in the scaled units of training.
        pre_encoder_bias: whether the encoder sees x − b_dec.
        metadata: JSON values kept in `sae.cfg.metadata`, and in cfg.json.
    """
    from sae_lens import __version__
    from sae_lens.registry import get_sae_class

    d_sae, d_in = params["W_dec"].shape
    sae_class, config_class = get_sae_class(ARCHITECTURES[architecture])
    extra = {"k": int(k)} if architecture == "topk" else {}
    config = config_class(
        d_in=d_in,
        d_sae=d_sae,
        dtype=str(params["W_dec"].dtype).removeprefix("torch."),
        device=str(params["W_dec"].device),
        apply_b_dec_to_input=pre_encoder_bias,
        **extra,
    )
    # without a version ≥ 6 sae_lens drops all other metadata when it loads
    config.metadata.sae_lens_version = __version__
    for name, value in (metadata or {}).items():
        setattr(config.metadata, name, value)
    sae = sae_class(config)
    b_enc = params["b_enc"] / input_scale
    state = {
        "W_enc": params["W_enc_T"].T.contiguous(),
        "W_dec": params["W_dec"],
        "b_dec": params["b_dec"] / input_scale,
    }
    if architecture == "gated":
        state |= {
            "b_gate": b_enc,
            "r_mag": params["r_mag"],
            "b_mag": params["b_mag"] / input_scale,
        }
    else:
        state["b_enc"] = b_enc
    if architecture == "jumprelu":
        threshold = params["threshold"]
    if ARCHITECTURES[architecture] == "jumprelu":
        state["threshold"] = torch.zeros_like(b_enc) + threshold / input_scale
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False)


def encode_sparse(sae: Any, x: Float[Tensor, "n d_in"]) -> Codes:
    """The latents z = sae.encode(x), sparse: CSR, on the CPU, float32.

    TopK, JumpReLU (and so BatchTopK and Matryoshka) and L1 SAEs of sae_lens on the
    CPU are encoded by our kernels, which never hold n × d_sae latents; any other SAE
    by its own `encode`, dense. The same latents either way, up to the rounding of a
    matrix product: one that lies on its threshold may fall on either side.
    """
    kind = type(sae).__name__ if type(sae).__module__.startswith("sae_lens.") else ""
    config = getattr(sae, "cfg", None)
    plain = kind in ("TopKSAE", "JumpReLUSAE", "StandardSAE")
    plain = plain and not getattr(config, "rescale_acts_by_decoder_norm", False)
    if not plain or sae.W_enc.device.type != "cpu" or sae.W_enc.dtype != torch.float32:
        return as_codes(sae.encode(x))
    pre = encode_chunks(sae.process_sae_in(x), sae.W_enc.T, sae.b_enc)
    if kind == "TopKSAE":
        return select_topk(pre, config.k)
    threshold = sae.threshold.clamp(min=0) if kind == "JumpReLUSAE" else 0.0
    return select_above(pre, threshold)


def as_codes(z: Float[Tensor, "n d_sae"]) -> Codes:
    """Dense codes as CSR, on the CPU, float32; entries that are zero are left out."""
    row, latent, value = firings(z)
    counts = torch.bincount(row, minlength=len(z)).cpu()
    indptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Codes(indptr, latent.int().cpu(), value.float().cpu())


def save(sae, path: str | Path) -> Path:
    """Write a sae_lens SAE to the new folder `path`, all of it or nothing.

    Raises: FileExistsError when `path` exists.
    """
    path = Path(path)
    if path.exists():
        raise FileExistsError(
            f"{path} exists already; an SAE is never overwritten: choose another "
            "folder or delete that one first"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        sae.save_model(scratch)
        for file in scratch.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())
        os.chmod(scratch, 0o777 & ~_umask())
        os.rename(scratch, path)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return path


def load(path: str | Path, device: str = "cpu"):
    """Open an SAE that `save`, or sae_lens itself, has written.

    Raises: FileNotFoundError when the folder or one of its two files is missing.
    """
    for name in ("cfg.json", "sae_weights.safetensors"):
        if not (Path(path) / name).is_file():
            raise FileNotFoundError(f"{path} holds no {name}: not a saved SAE")
    from sae_lens import SAE

    return SAE.load_from_disk(str(path), device=device).eval().requires_grad_(False)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
