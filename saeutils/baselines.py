"""Controls that stand in the same table as an SAE: what needs no training explains.

Each has `encode`, `decode` and `W_dec`, so `metrics.scorecard` takes it as it is.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from saeutils.sae import initial_params
from saeutils.store import as_store
from saeutils.streaming import BUDGET, Rows, RunningMoments, checked_chunks, rows_within


class Dictionary:
    """A fixed dictionary, used for writing and for reading.

        a = (x − b_dec) W_decᵀ · scale,   z = a with all but k entries set to zero,
        x̂ = z W_dec + b_dec

    The k entries kept are the largest of |a| (`signed`), or of a where it is positive.
    """

    def __init__(
        self,
        W_dec: Float[Tensor, "d_sae d_in"],
        b_dec: Float[Tensor, " d_in"],
        k: int | None = None,
        *,
        signed: bool = True,
        scale: float = 1.0,
    ):
        self.W_dec, self.b_dec = W_dec, b_dec
        self.k = len(W_dec) if k is None else k
        if not 0 <= self.k <= len(W_dec):
            raise ValueError(f"k must lie in 0..{len(W_dec)} (d_sae), got {k}")
        self.signed, self.scale = signed, scale

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_sae"]:
        a = (x - self.b_dec) @ self.W_dec.T * self.scale
        if not self.signed:
            a = a.relu()
        if self.k == len(self.W_dec):
            return a
        kept = a.abs().topk(self.k, dim=1).indices
        return torch.zeros_like(a).scatter_(1, kept, a.gather(1, kept))

    def decode(self, z: Float[Tensor, "n d_sae"]) -> Float[Tensor, "n d_in"]:
        return z @ self.W_dec + self.b_dec


class PCA(Dictionary):
    """The k directions of largest variance: the best linear code of k numbers a row.

    Exact, in one pass: eigenvectors of the float64 covariance. `k = 0` is the mean
    predictor, whose FVU is 1.

    Attributes:
        variance_share: share of the total variance of every direction, falling.

    Raises:
        ValueError: k beyond d_in, bad rows, or a covariance larger than 1 GiB.
    """

    variance_share: Float64[Tensor, " d_in"]

    def __init__(self, rows: Rows, k: int):
        d_in = as_store(rows).d_in
        if not 0 <= k <= d_in:
            raise ValueError(f"k must lie in 0..{d_in} (d_in), got {k}")
        if 8 * d_in**2 > 2**30:
            raise ValueError(
                f"d_in = {d_in} needs a covariance of {8 * d_in**2 / 2**30:.1f} GiB; "
                "PCA here is for up to 11,585 dimensions: project the rows first"
            )
        moments = _moments(rows, covariance=True)
        variance, vectors = torch.linalg.eigh(moments.scatter)
        variance = variance.flip(0).clamp(min=0)
        self.variance_share = variance / variance.sum()
        super().__init__(vectors.flip(1)[:, :k].T.float(), moments.mean.float())


def pca_points(rows: Rows) -> tuple[Float[Tensor, "n 2"], Float64[Tensor, " d_in"]]:
    """Where each row lies on the two largest components; share of every component."""
    store = as_store(rows)
    pca = PCA(store, 2)
    return pca.encode(store[:]), pca.variance_share


def mean_predictor(rows: Rows) -> Dictionary:
    """Says the mean of the rows whatever it sees; nothing is explained, FVU = 1."""
    mean = _moments(rows).mean.float()
    return Dictionary(mean.new_zeros(0, len(mean)), mean)


def neurons(rows: Rows, k: int | None = None) -> Dictionary:
    """The neurons themselves: the k a row that deviate most from their mean.

    `k = None` leaves the activations untouched (latent i is neuron i): not a
    competitor in FVU, which is 0, but what a latent's selectivity must beat.
    """
    d_in = as_store(rows).d_in
    if k is None:
        return Dictionary(torch.eye(d_in), torch.zeros(d_in))
    return Dictionary(torch.eye(d_in), _moments(rows).mean.float(), k)


def untrained(
    rows: Rows, d_sae: int, k: int, *, seed: int = 0, rescale: bool = True
) -> Dictionary:
    """A TopK SAE as training finds it: random unit rows around the data's mean.

    Args:
        seed: as in training, so this is that SAE's start.
        rescale: fit the one number that scales its codes best (least squares over all
            rows), so that the control does not lose merely by overshooting.
    """
    mean = _moments(rows).mean.float()
    W_dec = initial_params("topk", d_sae, mean, seed=seed)["W_dec"]
    sae = Dictionary(W_dec, mean, k, signed=False)
    if rescale:
        dot, square = 0.0, 0.0
        size = rows_within(BUDGET, d_sae)
        for x in checked_chunks(rows, len(mean), size):
            out = (sae.decode(sae.encode(x)) - mean).double()
            dot += (out * (x - mean)).sum().item()
            square += out.square().sum().item()
        sae.scale = dot / square if square > 0 else 1.0
    return sae


def controls(rows: Rows, d_sae: int, k: int, *, seed: int = 0) -> dict[str, Dictionary]:
    """What an SAE of d_sae latents, k of them active, must beat; by name.

    k is cut to d_in where it is larger.
    """
    return {
        f"PCA, {k} components": PCA(rows, min(k, as_store(rows).d_in)),
        f"{k} neurons": neurons(rows, min(k, as_store(rows).d_in)),
        "untrained SAE": untrained(rows, d_sae, k, seed=seed),
        "mean": mean_predictor(rows),
    }


def _moments(rows: Rows, covariance: bool = False) -> RunningMoments:
    d_in = as_store(rows).d_in
    moments = RunningMoments(d_in, covariance)
    for x in checked_chunks(rows, d_in, rows_within(BUDGET, 2 * d_in)):
        moments.update(x)
    return moments
