"""Codes for a given dictionary: what an optimal encoder would say.

    z = argmin_{z ≥ 0} ½‖x − b − z W‖² + λ Σ_j z_j          lasso, fista
    z = greedy choice of k atoms, all fitted anew each time    omp

An SAE's encoder is one linear map and a threshold, and cannot do this: where features
interfere, it errs even with the true dictionary. `SparseCoder` puts such inference in
the place of the encoder, to tell a bad dictionary from a weak encoder.

`lasso` and `fista` find the same minimum: the first changes few codes at a time and
is fast on a CPU, the second is matrix products and runs anywhere. Rows of W may have
any length; in the objective they count as they are.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saeutils.kernels import in_threads

CHUNK = 2048  # rows whose correlations with all atoms are held at once


class SparseCodes(NamedTuple):
    """At most `width` codes a row; places that are not needed hold value 0."""

    index: Int64[Tensor, "rows width"]
    value: Float[Tensor, "rows width"]

    def dense(self, m: int) -> Float[Tensor, "rows m"]:
        """As a matrix."""
        z = self.value.new_zeros(len(self.value), m)
        return z.scatter_add_(1, self.index, self.value)

    def times(self, W: Float[Tensor, "m d"]) -> Float[Tensor, "rows d"]:
        """z W, without making z dense."""
        return torch.nn.functional.embedding_bag(
            self.index, W, mode="sum", per_sample_weights=self.value
        )


class SparseCoder:
    """A dictionary with sparse inference for an encoder; can be scored like an SAE.

    Args:
        W, b: the dictionary (m, d) and what is added to every row.
        method: "lasso", "fista", "omp" (k atoms a row) or "omp at k", whose `encode`
            takes the number of atoms of each row: an oracle.
        penalty: λ; by default 0.15, for codes around 1.
        smallest: codes below leave after a re-fit without penalty (lasso). By
            default twice the penalty. With `refit=False` codes stay as λ shrank them.
        limits: width and sweeps of `lasso`.
    """

    def __init__(
        self,
        W: Float[Tensor, "m d"],
        b: Float[Tensor, " d"],
        method: str = "lasso",
        *,
        k: int = 0,
        penalty: int | float = 0.15,
        smallest: int | float | None = None,
        refit: bool = True,
        **limits: int,
    ) -> None:
        if method not in ("lasso", "fista", "omp", "omp at k"):
            raise ValueError(
                f"method {method!r} is none of lasso, fista, omp, omp at k"
            )
        self.W_dec, self.b_dec, self.method = W.detach(), b.detach(), method
        self.k, self.penalty, self.refit = k, penalty, refit
        self.smallest = 2 * penalty if smallest is None else smallest
        self.limits = limits
        self.needs_counts = method == "omp at k"

    def encode(
        self, x: Float[Tensor, "rows d"], counts: Int64[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "rows m"]:
        x = x - self.b_dec
        if self.method == "fista":
            return fista(x, self.W_dec, self.penalty)
        return self.sparse(x, counts).dense(len(self.W_dec))

    def sparse(
        self, centred: Float[Tensor, "rows d"], counts: Tensor | None = None
    ) -> SparseCodes:
        """Codes of x − b in sparse form; lasso and omp only."""
        if self.method == "lasso":
            return lasso(
                centred,
                self.W_dec,
                self.penalty,
                refit=self.refit,
                smallest=self.smallest,
                **self.limits,
            )
        return omp(centred, self.W_dec, self.k if counts is None else counts)

    def decode(self, z: Float[Tensor, "rows m"]) -> Float[Tensor, "rows d"]:
        return z @ self.W_dec + self.b_dec


@torch.no_grad()
def fista(
    x: Float[Tensor, "rows d"],
    W: Float[Tensor, "m _"],
    penalty: int | float,
    *,
    iterations: int = 200,
) -> Float[Tensor, "rows m"]:
    """argmin_{z ≥ 0} ½‖x − zW‖² + λ Σ z by accelerated proximal gradient.

    Steps 1/‖WWᵀ‖₂; momentum restarts when it points uphill. CHUNK rows at a time.
    Sources: Beck and Teboulle (2009); restart by O'Donoghue and Candès (2015).
    """
    _checked(x, W, penalty)
    if len(x) > CHUNK:
        parts = (fista(p, W, penalty, iterations=iterations) for p in x.split(CHUNK))
        return torch.cat(list(parts))
    step = 1 / torch.linalg.matrix_norm(W, 2).square()
    target = x @ W.T - penalty
    z = y = torch.zeros(len(x), len(W), device=x.device)
    t = torch.ones(len(x), 1, device=x.device)
    for _ in range(iterations):
        new = (y + step * (target - (y @ W) @ W.T)).relu()
        uphill = ((y - new) * (new - z)).sum(1, keepdim=True) > 0
        t = torch.where(uphill, torch.ones_like(t), t)
        t_new = (1 + (1 + 4 * t.square()).sqrt()) / 2
        y = new + torch.where(uphill, 0.0, (t - 1) / t_new) * (new - z)
        z, t = new, t_new
    return z


@torch.no_grad()
def lasso(
    x: Float[Tensor, "rows d"],
    W: Float[Tensor, "m _"],
    penalty: int | float,
    *,
    refit: bool = False,
    smallest: int | float = 0.0,
    width: int | None = None,
    sweeps: int = 2000,
) -> SparseCodes:
    """The minimum that `fista` tends to, by coordinate descent on a working set.

    Args:
        refit: afterwards fit the codes that are not zero without penalty (z ≥ 0), and
            drop codes below `smallest`, the smaller ones first, and fit again.
        width: most codes that a row may try at a time; default min(m, 4 d).
        sweeps: of the descent, at most; fewer give up sooner on atoms that hardly
            differ.

    Raises: ValueError for a penalty ≤ 0 or rows of another width.
    """
    from saeutils._coding_kernels import lasso_rows  # numba takes a second to import

    _checked(x, W, penalty)
    if penalty <= 0:
        raise ValueError(f"lasso wants a positive penalty, got {penalty}")
    width = min(len(W), 4 * W.shape[1]) if width is None else width
    options = (np.float32(penalty), np.float32(2e-4 * penalty), sweeps, refit)

    def solve(q0, G, x, first, index, value):
        in_threads(
            lambda start, stop: lasso_rows(
                start, stop, q0, G, *options, np.float32(smallest), index, value
            ),
            len(q0),
        )

    return _by_chunks(x, W, width, solve)


@torch.no_grad()
def omp(
    x: Float[Tensor, "rows d"],
    W: Float[Tensor, "m _"],
    k: int | Int64[Tensor, " rows"],
    *,
    tolerance: int | float = 0.0,
    stop_at: int | float = 0.0,
) -> SparseCodes:
    """Non-negative orthogonal matching pursuit from correlations ("batch OMP").

    Each step takes the atom whose product with the residual is largest, then fits
    all chosen codes anew (z ≥ 0). Rows of W are best of length 1.

    Args:
        k: atoms a row, at most; one number or one for each row.
        tolerance: stop when the squared residual is this share of ‖x‖².
        stop_at: stop when no product exceeds it.

    Sources: Rubinstein, Zibulevsky and Elad (2008); Yaghoobi, Wu and Davies (2015).
    """
    from saeutils._coding_kernels import omp_rows

    _checked(x, W, 0)
    ks = torch.as_tensor(k, dtype=torch.int64).expand(len(x)).cpu().numpy()
    if len(ks) and ks.min() < 0:
        raise ValueError("omp: k must not be negative")
    ks = np.minimum(ks, len(W))
    energy = x.square().sum(1).cpu().numpy()

    def solve(q0, G, x, first, index, value):
        part = slice(first, first + len(q0))
        limits = (energy[part], ks[part], np.float32(tolerance), np.float32(stop_at))
        in_threads(
            lambda start, stop: omp_rows(start, stop, q0, G, *limits, index, value),
            len(q0),
        )

    return _by_chunks(x, W, max(1, int(ks.max(initial=1))), solve)


def _by_chunks(x: Tensor, W: Tensor, width: int, solve) -> SparseCodes:
    """Correlations by a matrix product, then one row after another."""
    device, x, W = x.device, x.detach().cpu().float(), W.detach().cpu().float()
    G = (W @ W.T).numpy()
    index = np.zeros((len(x), width), np.int64)
    value = np.zeros((len(x), width), np.float32)
    for first in range(0, len(x), CHUNK):
        part = slice(first, first + CHUNK)
        q0 = (x[part] @ W.T).numpy()
        solve(q0, G, x[part], first, index[part], value[part])
    used = max(1, int((value > 0).sum(1).max(initial=1)))
    return SparseCodes(
        torch.from_numpy(index[:, :used]).to(device),
        torch.from_numpy(value[:, :used]).to(device),
    )


def _checked(x: Tensor, W: Tensor, penalty: int | float) -> None:
    if x.ndim != 2 or W.ndim != 2 or x.shape[1] != W.shape[1]:
        raise ValueError(
            f"rows {tuple(x.shape)} and dictionary {tuple(W.shape)}: both need the "
            "same number of columns"
        )
    if not math.isfinite(penalty) or penalty < 0:
        raise ValueError(f"penalty {penalty}: expected a number ≥ 0")
