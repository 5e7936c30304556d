"""The CPU bodies of `saeutils.kernels`, compiled by numba and cached on disk.

Each compiled function takes a range (start, stop) of rows or latents and releases
the GIL, so that `kernels.in_threads` can split the work. Loops over d_in are the
innermost ones and become SIMD code; sums may be reassociated, but NaN is kept.
"""

import inspect

import numba
import numpy as np
import torch
from torch import Tensor

from saeutils.kernels import in_threads


def _jit(function):
    """Compile; unwrapped first, since a test run wraps functions in type checks."""
    compiler = numba.njit(
        nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz", "arcp"}
    )
    return compiler(inspect.unwrap(function))


@_jit
def _cut(a, k, slack):
    """A value with k … k + slack entries of `a` above it, by bisection.

    Returns (cut, entries above). Where equal entries make that impossible, the cut
    is their value, and fewer than k entries lie above it. Counting is a vector
    loop, which beats a quickselect and its mispredicted branches.
    """
    low = high = a[0]
    for v in a:
        low = v if v < low else low
        high = v if v > high else high
    low -= abs(low) + a.dtype.type(1)
    above = 0  # entries > high
    while True:
        middle = low + (high - low) * a.dtype.type(0.5)
        if not low < middle < high:
            return high, above
        n = 0
        for c in range(len(a)):  # not `for v in a`: that is not vectorised
            n += a[c] > middle
        if n < k:
            high, above = middle, n
        elif n > k + slack:
            low = middle
        else:
            return middle, n


@_jit
def _block_maxima(row, out):
    """out[b] = largest of row[b], row[b + n_blocks], row[b + 2 n_blocks], …"""
    n_blocks = len(out)
    out[:] = row[:n_blocks]
    for start in range(n_blocks, len(row), n_blocks):
        part = row[start : start + n_blocks]
        for b in range(len(part)):
            out[b] = part[b] if part[b] > out[b] else out[b]


@_jit
def _topk_rows(start, stop, pre, k, n_blocks, positive, indices, values, counts):
    d = pre.shape[1]
    maxima = np.empty(n_blocks, pre.dtype)
    chosen = np.empty(n_blocks + 1, np.uint32)
    found_v = np.empty(d + 1, pre.dtype)
    found_i = np.empty(d + 1, np.uint32)
    for i in range(start, stop):
        row = pre[i]
        _block_maxima(row, maxima)
        # at least k block maxima lie above `bound`, so at least k entries do
        bound, blocks = _cut(maxima, k, k // 2)
        if blocks < k:  # ties: `bound` itself must count as above
            bound = np.nextafter(bound, pre.dtype.type(-np.inf))
        if positive and bound < 0:
            bound = pre.dtype.type(0)
        # compaction without branches: write always, advance only when it is kept
        blocks = np.uint32(0)
        for b in range(n_blocks):
            chosen[blocks] = b
            blocks += np.uint32(maxima[b] > bound)
        n = np.uint32(0)
        for first in range(0, d, n_blocks):
            part = row[first : first + n_blocks]
            for m in range(blocks):
                b = chosen[m]
                if b < len(part):
                    found_v[n] = part[b]
                    found_i[n] = first + b
                    n += np.uint32(part[b] > bound)
        if n <= k:
            indices[i, :n] = found_i[:n]
            values[i, :n] = found_v[:n]
            counts[i] = n
            continue
        cut, above = _cut(found_v[:n], k, 0)
        equal = k - above
        kept = 0
        for c in range(n):
            v = found_v[c]
            keep = v > cut or (v == cut and equal > 0)
            equal -= v == cut
            if keep:
                indices[i, kept] = found_i[c]
                values[i, kept] = v
                kept += 1
        counts[i] = kept


def topk(pre: Tensor, k: int, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Counts a row, indices and values of the k largest entries of each row."""
    n, d = pre.shape
    # about k blocks are searched and all block maxima are: balance the two
    n_blocks = min(d, max(k, 16 * round((d * k) ** 0.5 / 24)))
    indices = np.empty((n, k), np.int32)
    values = np.empty((n, k), pre.numpy().dtype)
    counts = np.empty(n, np.int64)
    in_threads(
        lambda a, b: _topk_rows(
            a, b, pre.numpy(), k, n_blocks, positive, indices, values, counts
        ),
        n,
        64,
    )
    if counts.min(initial=k) == k:
        flat_i, flat_v = indices.reshape(-1), values.reshape(-1)
    else:
        keep = np.arange(k) < counts[:, None]
        flat_i, flat_v = indices[keep], values[keep]
    return tuple(torch.from_numpy(a) for a in (counts, flat_i, flat_v))


@_jit
def _count_above(start, stop, pre, threshold, counts):
    d = pre.shape[1]
    for i in range(start, stop):
        n = 0
        for c in range(d):
            n += pre[i, c] > threshold[c]
        counts[i] = n


@_jit
def _fill_above(start, stop, pre, threshold, indptr, indices, values):
    d = pre.shape[1]
    for i in range(start, stop):
        n = indptr[i]
        for c in range(d):
            if pre[i, c] > threshold[c]:
                indices[n] = c
                values[n] = pre[i, c]
                n += 1


def above(pre: Tensor, threshold) -> tuple[Tensor, Tensor, Tensor]:
    """Counts a row, indices and values of the entries above the threshold."""
    rows = pre.numpy()
    n, d = rows.shape
    limit = torch.as_tensor(threshold, dtype=pre.dtype).expand(d).numpy()
    counts = np.empty(n, np.int64)
    in_threads(lambda a, b: _count_above(a, b, rows, limit, counts), n, 64)
    indptr = np.zeros(n + 1, np.int64)
    np.cumsum(counts, out=indptr[1:])
    indices = np.empty(indptr[-1], np.int32)
    values = np.empty(indptr[-1], rows.dtype)
    in_threads(
        lambda a, b: _fill_above(a, b, rows, limit, indptr, indices, values), n, 64
    )
    return tuple(torch.from_numpy(a) for a in (counts, indices, values))


@_jit
def _reconstruct_rows(
    start,
    stop,
    indptr,
    indices,
    values,
    level_of,
    W_dec,
    b_dec,
    x,
    residual,
    error,
    dot,
):
    levels, _, d = residual.shape
    for i in range(start, stop):
        for c in range(d):
            residual[0, i, c] = b_dec[c] - x[i, c]
        for m in range(1, levels):
            for c in range(d):
                residual[m, i, c] = 0
        e, last = indptr[i], indptr[i + 1]
        while levels == 1 and e + 4 <= last:  # four at a time: fewer stores
            w0, w1 = W_dec[indices[e]], W_dec[indices[e + 1]]
            w2, w3 = W_dec[indices[e + 2]], W_dec[indices[e + 3]]
            v0, v1, v2, v3 = values[e], values[e + 1], values[e + 2], values[e + 3]
            out = residual[0, i]
            for c in range(d):
                out[c] += v0 * w0[c] + v1 * w1[c] + v2 * w2[c] + v3 * w3[c]
            e += 4
        while e < last:
            w = W_dec[indices[e]]
            out = residual[level_of[indices[e]], i]
            for c in range(d):
                out[c] += values[e] * w[c]
            e += 1
        for m in range(levels):
            total = x.dtype.type(0)
            if m > 0:
                for c in range(d):
                    residual[m, i, c] += residual[m - 1, i, c]
            for c in range(d):
                total += residual[m, i, c] * residual[m, i, c]
            error[m, i] = total
        for m in range(levels - 2, -1, -1):
            for c in range(d):
                residual[m, i, c] += residual[m + 1, i, c]
        for e in range(indptr[i], indptr[i + 1]):
            w = W_dec[indices[e]]
            out = residual[level_of[indices[e]], i]
            total = x.dtype.type(0)
            for c in range(d):
                total += out[c] * w[c]
            dot[e] = total


def reconstruct(codes, level_of, levels, W_dec, b_dec, x):
    """Residual, squared error and dot products; see `kernels.Forward`."""
    rows = x.numpy()
    residual = np.empty((levels, *rows.shape), rows.dtype)
    error = np.empty((levels, len(rows)), rows.dtype)
    dot = np.empty(len(codes.values), rows.dtype)
    arrays = [t.detach().numpy() for t in (*codes, level_of, W_dec, b_dec)]
    in_threads(
        lambda a, b: _reconstruct_rows(a, b, *arrays, rows, residual, error, dot),
        len(rows),
    )
    total = error.sum(1, dtype=np.float64)
    return tuple(torch.from_numpy(a) for a in (residual, total, dot))


@_jit
def _to_columns(indptr, indices, values, grad, column_ptr, row, value, gradient):
    """Counting sort of the CSR entries by latent: CSR → CSC."""
    n_columns = len(column_ptr) - 1
    column_ptr[:] = 0
    for e in range(len(indices)):
        column_ptr[indices[e] + 1] += 1
    for j in range(n_columns):
        column_ptr[j + 1] += column_ptr[j]
    cursor = column_ptr[:-1].copy()
    for i in range(len(indptr) - 1):
        for e in range(indptr[i], indptr[i + 1]):
            at = cursor[indices[e]]
            cursor[indices[e]] += 1
            row[at] = i
            value[at] = values[e]
            gradient[at] = grad[e]


@_jit
def _gradient_latents(
    start,
    stop,
    column_ptr,
    row,
    value,
    gradient,
    residual,
    scale,
    centred,
    grad_W_enc_T,
    grad_b_enc,
    grad_W_dec,
):
    d = centred.shape[1]
    for j in range(start, stop):
        enc, dec = grad_W_enc_T[j], grad_W_dec[j]
        for c in range(d):
            enc[c] = 0
            dec[c] = 0
        bias = centred.dtype.type(0)
        e, last = column_ptr[j], column_ptr[j + 1]
        while e + 4 <= last:  # four at a time: fewer stores
            x0, x1 = centred[row[e]], centred[row[e + 1]]
            x2, x3 = centred[row[e + 2]], centred[row[e + 3]]
            r0, r1 = residual[row[e]], residual[row[e + 1]]
            r2, r3 = residual[row[e + 2]], residual[row[e + 3]]
            g0, g1 = gradient[e], gradient[e + 1]
            g2, g3 = gradient[e + 2], gradient[e + 3]
            v0, v1 = value[e] * scale, value[e + 1] * scale
            v2, v3 = value[e + 2] * scale, value[e + 3] * scale
            bias += g0 + g1 + g2 + g3
            for c in range(d):
                enc[c] += g0 * x0[c] + g1 * x1[c] + g2 * x2[c] + g3 * x3[c]
                dec[c] += v0 * r0[c] + v1 * r1[c] + v2 * r2[c] + v3 * r3[c]
            e += 4
        for rest in range(e, last):
            xi, ri = centred[row[rest]], residual[row[rest]]
            g, v = gradient[rest], value[rest] * scale
            bias += g
            for c in range(d):
                enc[c] += g * xi[c]
                dec[c] += v * ri[c]
        grad_b_enc[j] = bias


def gradients(codes, grad_values, residual, scale, centred, starts, stops, out):
    """Write W_enc_T, b_enc and W_dec of `out`; see `kernels.gradients`."""
    x = centred.numpy()
    nnz = len(codes.values)
    column_ptr = np.empty(len(out.W_dec) + 1, np.int64)
    row = np.empty(nnz, np.int32)
    value, gradient = np.empty(nnz, x.dtype), np.empty(nnz, x.dtype)
    csr = [t.numpy() for t in codes]
    _to_columns(*csr, grad_values.numpy(), column_ptr, row, value, gradient)
    arrays = [t.numpy() for t in (out.W_enc_T, out.b_enc, out.W_dec)]
    for level, (first, last) in enumerate(zip(starts, stops, strict=True)):
        r = residual[level].numpy()
        in_threads(
            lambda a, b, r=r, first=first: _gradient_latents(
                first + a,
                first + b,
                column_ptr,
                row,
                value,
                gradient,
                r,
                x.dtype.type(scale),
                x,
                *arrays,
            ),
            last - first,
        )
