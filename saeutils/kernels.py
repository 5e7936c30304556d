"""Sparse kernels of SAE training: nothing of size batch × d_sae is ever kept.

The latents of a batch are held as `Codes` (CSR: indptr, indices, values). One
training step of a top-k SAE is then three calls, in this order:

    codes     = select_*(...)        encode a chunk of rows, keep what is chosen
    forward   = reconstruct(...)     x̂ = codes · W_dec + b_dec, residual, ∂L/∂codes
    gradients(...)                   ∂L/∂W_enc, ∂L/∂W_dec, ∂L/∂b_enc, ∂L/∂b_dec

Only the encoder's matrix product is dense, and it is done in chunks of rows that
are thrown away as soon as the largest entries are taken out. What is special:

* exact top-k without sorting: split a row into strided blocks; the k-th largest
  block maximum bounds the k-th largest entry from below, so only entries of about
  k blocks are looked at;
* W_enc and W_dec are both kept as (d_sae, d_in), so that a latent is one
  contiguous row in either, and its gradient is a sum over the few rows of the
  batch that it fired on (a counting sort turns CSR into CSC);
* the encoder sees x − b_dec, so its share of b_dec's gradient is −W_enc · ∂L/∂b_enc:
  a matrix-vector product in place of a matrix product.

Every function has two bodies: numba on CPU, and plain torch for any other device
(and as the slow obvious reference in the tests). Threads follow
`torch.get_num_threads()`.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 8 * 2**20  # of pre-activations alive at once: what caches like
GPU_CHUNK_BYTES = 2**28  # … and what keeps a GPU busy


class Codes(NamedTuple):
    """Sparse latents of a batch (CSR). Row i owns entries indptr[i]:indptr[i+1]."""

    indptr: Int[Tensor, " batch_plus_1"]
    indices: Int[Tensor, " nnz"]
    values: Float[Tensor, " nnz"]

    @property
    def rows(self) -> Int[Tensor, " nnz"]:
        """Row of the batch that each entry belongs to."""
        counts = self.indptr.diff()
        return torch.repeat_interleave(counts)

    def dense(self, d_sae: int) -> Float[Tensor, "batch d_sae"]:
        """The same latents as a dense matrix; for tests and small batches."""
        out = self.values.new_zeros(len(self.indptr) - 1, d_sae)
        out[self.rows, self.indices.long()] = self.values
        return out


class Forward(NamedTuple):
    """What `reconstruct` returns; L: nested widths, 1 if not nested."""

    residual: Float[Tensor, "L batch d_in"]
    """Level l: Σ over the widths m ≥ l of x̂_m − x."""
    squared_error: Float[Tensor, " L"]
    """Σ over rows and dimensions of (x̂_m − x)², in float64."""
    dot: Float[Tensor, " nnz"]
    """residual of the entry's row and level · W_dec row: ½ ∂(Σ loss)/∂value."""


class Weights(NamedTuple):
    """The four tensors of an SAE, latents first; `W_enc_T` is sae_lens' W_enc.T."""

    W_enc_T: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]


# ----------------------------------------------------------------- encode + select


def encode_chunks(
    centred: Float[Tensor, "batch d_in"],
    W_enc_T: Float[Tensor, "d_sae d_in"],
    b_enc: Float[Tensor, " d_sae"],
    low_precision: bool = False,
):
    """Yield (start, pre-activations of some rows); the buffer is reused.

    `low_precision` multiplies in bfloat16 and returns the dtype of `centred`.
    """
    batch, d_sae = len(centred), len(W_enc_T)
    budget = GPU_CHUNK_BYTES
    if centred.device.type == "cpu":
        budget = CHUNK_BYTES * torch.get_num_threads()
    size = min(batch, max(64, budget // (d_sae * centred.element_size())))
    out = centred.new_empty(size, d_sae)
    if low_precision:
        centred, W_enc_T = centred.bfloat16(), W_enc_T.bfloat16()
    for start in range(0, batch, size):
        rows = centred[start : start + size]
        if low_precision:
            yield start, torch.add(b_enc, rows @ W_enc_T.T, out=out[: len(rows)])
        else:
            yield start, torch.addmm(b_enc, rows, W_enc_T.T, out=out[: len(rows)])


def select_topk(pre_chunks, k: int, positive: bool = True) -> Codes:
    """Keep the k largest pre-activations of every row, and of those the positive.

    `pre_chunks` is what `encode_chunks` yields. Dropping what is not positive is
    TopK's ReLU: such entries have value and gradient 0. `positive=False` keeps
    them (AuxK). Of equal values the earlier in the kernel's scan is kept.
    """

    def largest(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        n = min(k, pre.shape[1])
        if _numba_runs(pre):
            return _numba().topk(pre, n, positive)
        top = pre.topk(n, dim=-1, sorted=False)
        keep = top.values > 0 if positive else torch.ones_like(top.values).bool()
        return keep.sum(-1), top.indices[keep].int(), top.values[keep]

    return _join(largest(pre) for _, pre in pre_chunks)


def select_above(pre_chunks, threshold: Tensor | int | float) -> Codes:
    """Keep every pre-activation above `threshold` (a number, or one a latent)."""

    def above(pre: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if _numba_runs(pre):
            return _numba().above(pre, threshold)
        keep = pre > threshold
        return keep.sum(-1), keep.nonzero()[:, 1].int(), pre[keep]

    return _join(above(pre) for _, pre in pre_chunks)


def select_batch_topk(
    encode: Callable[[], object],
    total: int,
    guess: int | float,
    gather: Callable[[Tensor], Tensor] = lambda values: values,
) -> tuple[Codes, float]:
    """Keep the `total` largest positive pre-activations of the whole batch.

    Args:
        encode: starts the stream of chunks anew (called again if `guess` is high).
        total: how many to keep, over all processes.
        guess: a threshold expected to lie a little below the exact one; any value
            gives the exact result, a good one gives it in one pass.
        gather: joins the values of all processes (identity for one process).
    Returns: codes, and the exact threshold: the smallest value kept.
    """
    while True:
        codes = select_above(encode(), guess)
        everywhere = gather(codes.values)
        if len(everywhere) >= total or guess <= 0:
            break
        guess = guess / 2 if guess > 1e-6 else 0.0
    if len(everywhere) > total:
        cut = torch.kthvalue(everywhere, len(everywhere) - total + 1).values
        keep = codes.values >= cut  # entries equal to the cut all stay
        counts = torch.zeros_like(codes.indptr[1:])
        counts.index_add_(
            0, codes.rows[keep], torch.ones_like(counts[:1]).expand(int(keep.sum()))
        )
        codes = _join([(counts, codes.indices[keep], codes.values[keep])])
        return codes, float(cut)
    return codes, float(everywhere.min()) if len(everywhere) else 0.0


def _join(parts: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Codes:
    """One `Codes` of (entries a row, indices, values) of consecutive rows."""
    counts, indices, values = zip(*parts, strict=True)
    counts = torch.cat(counts).long()
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return Codes(indptr, torch.cat(indices), torch.cat(values))


# ------------------------------------------------------------ forward and backward


def reconstruct(
    codes: Codes,
    W_dec: Float[Tensor, "d_sae d_in"],
    b_dec: Float[Tensor, " d_in"],
    x: Float[Tensor, "batch d_in"],
    widths: tuple[int, ...] = (),
) -> Forward:
    """x̂_m = Σ_{j < width m} z_j W_dec[j] + b_dec for every nested width m.

    `widths` are Matryoshka's prefix sizes in rising order, the last one d_sae;
    empty for an SAE without nesting.
    """
    levels = max(1, len(widths))
    level_of = torch.zeros(len(W_dec), dtype=torch.int64, device=x.device)
    if levels > 1:
        edges = torch.tensor(widths[:-1], device=x.device)
        level_of = torch.searchsorted(
            edges, torch.arange(len(W_dec), device=x.device), right=True
        )
    if _numba_runs(x):
        return Forward(*_numba().reconstruct(codes, level_of, levels, W_dec, b_dec, x))
    entry_level = level_of[codes.indices.long()]
    residual = x.new_empty(levels, *x.shape)
    for level in range(levels):
        values = torch.where(entry_level == level, codes.values, 0)
        residual[level] = _csr(codes, values, len(W_dec)) @ W_dec
    residual[0] += b_dec - x
    residual = residual.cumsum(0)
    squared_error = residual.double().square().sum((1, 2))
    residual = residual.flip(0).cumsum(0).flip(0)  # level l collects all widths ≥ l
    dot = torch.empty_like(codes.values)
    for part in _slices(codes, x):
        j, i = codes.indices[part].long(), codes.rows[part]
        dot[part] = (residual[entry_level[part], i] * W_dec[j]).sum(-1)
    return Forward(residual, squared_error, dot)


def gradients(
    codes: Codes,
    grad_values: Float[Tensor, " nnz"],
    residual: Float[Tensor, "L batch d_in"],
    scale: int | float,
    centred: Float[Tensor, "batch d_in"],
    weights: Weights,
    widths: tuple[int, ...] = (),
    encoder_centred: bool = True,
    out: Weights | None = None,
) -> Weights:
    """Gradients of the loss, given ∂L/∂values and ∂L/∂x̂ = scale · residual.

    Returns them in the layout of `Weights`, written into `out` if given:
    W_dec[j] ← scale Σ_i z_ij residual_i,  W_enc_T[j] ← Σ_i g_ij (x_i − b_dec),
    b_enc[j] ← Σ_i g_ij,  b_dec ← scale Σ_i residual_i − W_enc · ∂L/∂b_enc.
    """
    out = out or Weights(*(torch.empty_like(w) for w in weights))
    d_sae = len(weights.W_dec)
    levels = len(residual)
    starts = [0, *widths[:-1]] if levels > 1 else [0]
    stops = list(widths) if levels > 1 else [d_sae]
    if _numba_runs(centred):
        _numba().gradients(
            codes, grad_values, residual, scale, centred, starts, stops, out
        )
    else:
        order = codes.indices.argsort(stable=True)
        row, j = codes.rows[order], codes.indices[order].long()
        indptr = torch.zeros(d_sae + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(torch.bincount(j, minlength=d_sae), 0, out=indptr[1:])
        by_latent = Codes(indptr, row, codes.values[order])
        for level, (a, b) in enumerate(zip(starts, stops, strict=True)):
            lo, hi = int(indptr[a]), int(indptr[b])
            part = Codes(indptr[a : b + 1] - lo, row[lo:hi], by_latent.values[lo:hi])
            out.W_dec[a:b] = scale * (
                _csr(part, part.values, len(centred)) @ residual[level]
            )
        grad = grad_values[order]
        out.W_enc_T[:] = _csr(by_latent, grad, len(centred)) @ centred
        out.b_enc.zero_().index_add_(0, j, grad)
    torch.sum(residual[0], 0, out=out.b_dec)
    out.b_dec.mul_(scale)
    if encoder_centred:
        out.b_dec.addmv_(weights.W_enc_T.T, out.b_enc, alpha=-1)
    return out


def _csr(codes: Codes, values: Tensor, n_columns: int) -> Tensor:
    size = (len(codes.indptr) - 1, n_columns)
    return torch.sparse_csr_tensor(
        codes.indptr, codes.indices.long(), values, size, check_invariants=False
    )


def _slices(codes: Codes, x: Tensor):
    step = max(1, 4 * CHUNK_BYTES // (x.shape[1] * x.element_size()))
    for start in range(0, len(codes.values), step):
        yield slice(start, start + step)


# --------------------------------------------------------------------- numba bodies


def _numba_runs(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not _REFERENCE
    )


_REFERENCE = False  # tests set this to run the torch bodies on CPU


@cache
def _numba():
    from saeutils import _numba_kernels

    return _numba_kernels


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="saeutils")


def in_threads(kernel: Callable[[int, int], None], n: int, at_least: int = 256) -> None:
    """Run kernel(start, stop) over 0..n, split over torch's number of threads."""
    threads = min(torch.get_num_threads(), max(1, n // at_least))
    if threads == 1:
        kernel(0, n)
        return
    edges = [n * t // threads for t in range(threads + 1)]
    pool = _pool(threads)
    others = [pool.submit(kernel, a, b) for a, b in pairwise(edges[1:])]
    kernel(0, edges[1])
    for other in others:
        other.result()
