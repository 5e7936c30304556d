"""CPU bodies of `saeutils.sparse_coding`: one row at a time, from correlations.

Both solvers see a row x only through q₀ = W (x − b) and G = W Wᵀ, and change few
codes a row, so they cost a small part of the iterations over all codes that FISTA
makes. A "working set" S holds the codes that may differ from zero.
"""

import inspect

import numba
import numpy as np


def _jit(function):
    """Compile; unwrapped first, since a test run wraps functions in type checks."""
    return numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"})(
        inspect.unwrap(function)
    )


@_jit
def _descend(S, z, G, q0, penalty, tolerance, sweeps):
    """Minimise ½ zᵀGz − q₀z + penalty Σz over z ≥ 0 on the set S, code by code."""
    n = len(S)
    g = np.empty((n, n), np.float32)
    r = np.empty(n, np.float32)
    for a in range(n):
        for c in range(n):
            g[a, c] = G[S[a], S[c]]
    for a in range(n):
        r[a] = q0[S[a]] - penalty
        for c in range(n):
            r[a] -= g[a, c] * z[c]
    for _ in range(sweeps):
        largest = np.float32(0)
        for a in range(n):
            new = max(z[a] + r[a] / g[a, a], np.float32(0))
            delta = new - z[a]
            if delta != 0:
                z[a] = new
                for c in range(n):
                    r[c] -= g[a, c] * delta
                largest = max(largest, abs(delta))
        if largest <= tolerance:
            break


@_jit
def lasso_rows(
    start, stop, q0, G, penalty, tolerance, sweeps, refit, smallest, index, value
):
    """Non-negative lasso: the S that violates the optimality conditions grows until
    none does. Then, if asked, exact re-fit on S without penalty, and codes below
    `smallest` leave, the smaller ones first."""
    m, width = q0.shape[1], index.shape[1]
    S = np.empty(width, np.int64)
    z = np.empty(width, np.float32)
    q = np.empty(m, np.float32)
    for row in range(start, stop):
        n = 0
        cut = np.float32(0.3)
        for _ in range(60):
            q[:] = q0[row]
            for a in range(n):
                for j in range(m):
                    q[j] -= G[S[a], j] * z[a]
            for a in range(n):
                q[S[a]] = -np.inf
            top = np.float32(0)
            for j in range(m):
                top = max(top, q[j])
            if top <= penalty + tolerance or n == width:
                break
            # All strong violators join at once; few rounds are needed then.
            bar = max(penalty + tolerance, top * (1 - cut))
            for j in range(m):
                if q[j] >= bar and n < width:
                    S[n], z[n] = j, 0
                    n += 1
            _descend(S[:n], z[:n], G, q0[row], penalty, tolerance, sweeps)
            kept = 0
            for a in range(n):
                if z[a] > 0:
                    S[kept], z[kept] = S[a], z[a]
                    kept += 1
            n = kept
        if refit:
            n = _refit(S, z, n, G, q0[row], tolerance, sweeps, smallest)
        _write(S, z, n, index[row], value[row])


@_jit
def _refit(S, z, n, G, q0, tolerance, sweeps, smallest):
    """Least squares over z ≥ 0 on S; while codes are below `smallest`, those below the
    mean of these leave and the rest is fitted again. Returns how many stay."""
    while n > 0:
        _descend(S[:n], z[:n], G, q0, np.float32(0), tolerance, sweeps)
        count, mean = 0, np.float32(0)
        for a in range(n):
            if z[a] < smallest or z[a] <= 0:
                count += 1
                mean += z[a]
        if count == 0:
            break
        mean /= count
        kept = 0
        for a in range(n):
            if z[a] > mean or z[a] >= smallest > 0:
                S[kept], z[kept] = S[a], z[a]
                kept += 1
        if kept == n:  # all equal up to rounding
            kept -= 1
        n = kept
    return n


@_jit
def omp_rows(start, stop, q0, G, energy, ks, tolerance, stop_at, index, value):
    """Non-negative orthogonal matching pursuit; all chosen codes fitted anew after
    each choice. Ends at ks[row] atoms, or when the best correlation is ≤ stop_at, or
    the squared residual is ≤ tolerance · energy."""
    m = q0.shape[1]
    S = np.empty(index.shape[1], np.int64)
    z = np.empty(index.shape[1], np.float32)
    q = np.empty(m, np.float32)
    for row in range(start, stop):
        n = 0
        q[:] = q0[row]
        while n < ks[row]:
            best = 0
            for j in range(m):
                if q[j] > q[best]:
                    best = j
            if q[best] <= stop_at:
                break
            S[n], z[n] = best, 0
            n += 1
            _descend(S[:n], z[:n], G, q0[row], np.float32(0), np.float32(1e-6), 2000)
            q[:] = q0[row]
            explained = np.float32(0)
            for a in range(n):
                explained += z[a] * q0[row, S[a]]
                for j in range(m):
                    q[j] -= G[S[a], j] * z[a]
            for a in range(n):
                q[S[a]] = -np.inf
            # For a least-squares fit ‖x − zW‖² = ‖x‖² − Σ z q₀.
            if energy[row] - explained <= tolerance * energy[row]:
                break
        _write(S, z, n, index[row], value[row])


@_jit
def _write(S, z, n, index, value):
    """The codes of one row; unused places are 0 with value 0."""
    index[:] = 0
    value[:] = 0
    for a in range(n):
        index[a], value[a] = S[a], z[a]


@_jit
def statistics(index, value, x, A, B, used):
    """Adds Σ z zᵀ to A, Σ z xᵀ to B and the number of rows of each atom to `used`."""
    rows, width = index.shape
    for row in range(rows):
        for a in range(width):
            if value[row, a] > 0:
                i = index[row, a]
                used[i] += 1
                for c in range(width):
                    if value[row, c] > 0:
                        A[i, index[row, c]] += value[row, a] * value[row, c]
                for k in range(x.shape[1]):
                    B[i, k] += value[row, a] * x[row, k]


@_jit
def atom_sweep(W, A, B):
    """Each atom in turn: W_j + (B_j − A_j W) / A_jj, made length 1; in place."""
    m, d = W.shape
    step = np.empty(d, np.float32)
    for j in range(m):
        if A[j, j] <= 0:
            continue
        step[:] = B[j]
        for i in range(m):
            if A[j, i] != 0:
                for k in range(d):
                    step[k] -= A[j, i] * W[i, k]
        length = np.float32(0)
        for k in range(d):
            step[k] = W[j, k] + step[k] / A[j, j]
            length += step[k] * step[k]
        if length > 0:
            W[j] = step / np.sqrt(length)
