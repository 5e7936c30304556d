"""Other bases for the rows before an SAE, and the SAE brought back to the original one.

    basis = fit_basis(rows, "whitened")
    run = train(basis(rows), config)            # the SAE sees y, not x
    sae = fold(run.sae, basis)                  # takes and gives x again
    metrics.scorecard(sae, rows, ...)           # so its FVU is about x

A basis is an invertible (or, with fewer components, linear) map:

    y = (x − mean) forward,      x̂ = mean + ŷ backward

Folding it into an SAE is exact: pre-activations and codes are the same, and the
reconstruction is that of y mapped back.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saeutils.store import as_store
from saeutils.streaming import BUDGET, Rows, RunningMoments, checked_chunks, rows_within

KINDS = ("identity", "standardised", "PCA", "ICA", "whitened")
FLOOR = 1e-6  # of the largest variance; directions below it count as constant


@dataclass(frozen=True, eq=False)
class Basis:
    """y = (x − mean) forward,  x̂ = mean + ŷ backward."""

    name: str
    mean: Float64[Tensor, " d_in"]
    forward: Float64[Tensor, "d_in d_out"]
    backward: Float64[Tensor, "d_out d_in"]
    converged: bool = True
    """Whether the fit did; only ICA's can fail to."""

    def __call__(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
        """Rows in the new basis."""
        mean, forward = self.mean.to(x.device), self.forward.to(x.device)
        return ((x.double() - mean) @ forward).to(x.dtype)

    def invert(self, y: Float[Tensor, "n d_out"]) -> Float[Tensor, "n d_in"]:
        """Rows back in the original one."""
        mean, backward = self.mean.to(y.device), self.backward.to(y.device)
        return (mean + y.double() @ backward).to(y.dtype)


def fit_basis(
    rows: Rows,
    kind: str,
    *,
    components: int | None = None,
    seed: int = 0,
    sample: int = 10_000,
    max_iter: int = 100,
) -> Basis:
    """A basis fitted to the rows, all with the rows' mean at zero.

    kind:
        identity      x − mean; nothing else, the control.
        standardised  each dimension at variance 1.
        PCA           principal axes: a rotation, so that distances stay as they are.
        whitened      ZCA: variance 1 in every direction, and y as near to x as that
                      allows; V Λ^(−1/2) Vᵀ with the covariance V Λ Vᵀ.
        ICA           whitened, then rotated to axes as independent as possible
                      (scikit-learn's FastICA on `sample` rows drawn with `seed`).

    Args:
        components: for PCA, whitened and ICA: keep that many directions of largest
            variance. Default: all that vary (more than 1e-6 of the largest).
        max_iter: of ICA; `converged` says whether they were enough.

    Raises:
        ValueError: an unknown kind, components beyond d_in or below 1, bad rows, or
            rows that never vary.
    """
    store = as_store(rows)
    d_in = store.d_in
    if kind not in KINDS:
        raise ValueError(f"basis {kind!r} is none of {', '.join(KINDS)}")
    if components is not None and not 1 <= components <= d_in:
        raise ValueError(f"components must lie in 1..{d_in} (d_in), got {components}")
    moments = RunningMoments(d_in, covariance=kind not in KINDS[:2])
    for x in checked_chunks(store, d_in, rows_within(BUDGET, 2 * d_in)):
        moments.update(x)
    if kind == "identity":
        eye = torch.eye(d_in, dtype=torch.float64)
        return Basis(kind, moments.mean, eye, eye)
    if kind == "standardised":
        sd = (moments.scatter / moments.n).sqrt()
        sd[sd <= FLOOR**0.5 * sd.max()] = 1.0  # constant: left as it is
        return Basis(kind, moments.mean, (1 / sd).diag(), sd.diag())
    variance, axes = torch.linalg.eigh(moments.scatter / moments.n)
    variance, axes = variance.flip(0), axes.flip(1)
    if not variance[0] > 0:
        raise ValueError("the rows never vary: there is no basis to find")
    kept = int((variance > FLOOR * variance[0]).sum())
    kept = min(kept, components or kept)
    axes, sd = axes[:, :kept], variance[:kept].sqrt()
    if kind == "PCA":
        return Basis(kind, moments.mean, axes, axes.T)
    whiten, colour = axes / sd, (axes * sd).T
    if kind == "whitened":
        return Basis(kind, moments.mean, whiten @ axes.T, axes @ colour)
    rotation, converged = _independent(
        store, moments.mean, whiten, seed, sample, max_iter
    )
    return Basis(kind, moments.mean, whiten @ rotation, rotation.T @ colour, converged)


def _independent(
    store, mean: Tensor, whiten: Tensor, seed: int, sample: int, max_iter: int
) -> tuple[Float64[Tensor, "d d"], bool]:
    """FastICA's rotation of the whitened rows, and whether it converged."""
    import warnings

    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(store), generator=generator)[:sample].sort().values
    y = (store.gather(index).double() - mean) @ whiten
    ica = FastICA(whiten=False, max_iter=max_iter, tol=1e-3, random_state=seed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        ica.fit(y.numpy())
    # Each row of the sample's rotation is orthonormal up to rounding; make it exact.
    u, _, vt = torch.linalg.svd(torch.from_numpy(ica.components_).double())
    failed = any(issubclass(w.category, ConvergenceWarning) for w in caught)
    return (u @ vt).T, not failed


@torch.no_grad()
def fold(sae, basis: Basis):
    """The SAE for x that does what `sae` does for y = basis(x); exactly.

    With pre-activations (y − b_dec) W_enc + b_enc (sae_lens' pre-encoder bias):

        W_enc' = forward W_enc            W_dec' = W_dec backward
        b_dec' = mean + b_dec backward    b_enc' = b_enc + (b_dec backward forward
                                                            − b_dec) W_enc

    Codes and thresholds stay as they are, so decoder rows are no longer unit vectors
    unless the basis is a rotation.

    Raises:
        ValueError: an SAE of another width, or of another kind of encoder.
    """
    from sae_lens import __version__
    from sae_lens.registry import get_sae_class

    d_in, d_out = basis.forward.shape
    if sae.cfg.d_in != d_out:
        raise ValueError(
            f"the SAE takes rows of {sae.cfg.d_in} dimensions, the basis gives {d_out}"
        )
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    bias = "b_gate" if "b_gate" in state else "b_enc"
    if bias not in state:
        raise ValueError(f"{type(sae).__name__} has no b_enc to fold the basis into")
    W_enc, b_dec = state["W_enc"].double(), state["b_dec"].double()
    mean, forward, backward = (
        part.to(W_enc.device) for part in (basis.mean, basis.forward, basis.backward)
    )
    if sae.cfg.apply_b_dec_to_input:
        shift = (b_dec @ backward @ forward - b_dec) @ W_enc
    else:  # the encoder sees x itself
        shift = -(mean @ forward) @ W_enc
    new = {
        "W_enc": forward @ W_enc,
        "W_dec": state["W_dec"].double() @ backward,
        "b_dec": mean + b_dec @ backward,
        bias: state[bias].double() + shift,
    }
    if "b_mag" in state:
        new["b_mag"] = state["b_mag"].double() + shift * state["r_mag"].double().exp()
    state |= {name: value.to(sae.W_dec.dtype) for name, value in new.items()}
    sae_class, config_class = get_sae_class(sae.cfg.architecture())
    config = config_class.from_dict(sae.cfg.to_dict() | {"d_in": d_in})
    config.metadata.sae_lens_version = __version__
    config.metadata.basis = basis.name
    folded = sae_class(config).to(sae.W_dec.dtype)
    folded.load_state_dict(state)
    return folded.eval().requires_grad_(False)
