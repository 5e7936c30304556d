"""An SAE on rows it was not trained on: what a shift, a scale or a new decoder mends.

Each function gives a new SAE for the new rows, so that `metrics.scorecard` says what
was lost to the mean, what to the scale, what to the decoder, and what remains.
"""

from copy import deepcopy
from typing import Any

import torch

from saeutils.bases import Basis, fold
from saeutils.store import as_store
from saeutils.streaming import BUDGET, Rows, RunningMoments, checked_chunks, rows_within


def moved(sae: Any, trained_on: Rows, rows: Rows, *, rescale: bool = False) -> Any:
    """The SAE that sees `rows` at the mean (and size) of the rows it was trained on.

        y = mean_old + s (x − mean_new),   s = √(total variance old / new), or 1

    folded into it exactly, so that it takes and gives x.

    Raises: ValueError for rows that never vary (with `rescale`), or of other widths.
    """
    old, new = _moments(trained_on), _moments(rows)
    if len(old.mean) != len(new.mean):
        raise ValueError(
            f"trained on rows of {len(old.mean)} dimensions, given {len(new.mean)}"
        )
    s = 1.0
    if rescale:
        variance = [float(m.scatter.sum() / m.n) for m in (old, new)]
        if not min(variance) > 0:
            raise ValueError("rows that never vary have no size to bring together")
        s = (variance[0] / variance[1]) ** 0.5
    eye = torch.eye(len(new.mean), dtype=torch.float64)
    name = "moved and rescaled" if rescale else "moved"
    return fold(sae, Basis(name, new.mean - old.mean / s, s * eye, eye / s))


@torch.no_grad()
def refit_decoder(sae: Any, rows: Rows, *, ridge: float = 1e-4) -> Any:
    """The same encoder with the decoder that is best for `rows`, by least squares.

        min over W, b  mean ‖x − z W − b‖² + ridge · mean(z²) ‖W − W_dec‖²

    Latents that never fire on the rows keep their decoder rows. How far FVU falls says
    what was wrong with directions; what stays is the code's own loss. The encoder goes
    on subtracting the OLD b_dec: it is moved into b_enc.

    Raises: ValueError as `metrics.scorecard` does for bad rows.
    """
    d_sae, d_in = sae.W_dec.shape
    gram = torch.zeros(d_sae, d_sae, dtype=torch.float64)
    cross = torch.zeros(d_sae, d_in, dtype=torch.float64)
    sum_z, sum_x, n = torch.zeros(d_sae).double(), torch.zeros(d_in).double(), 0
    device = sae.W_dec.device
    for x in checked_chunks(rows, d_in, rows_within(BUDGET, d_sae), device):
        z, x = sae.encode(x).double().cpu(), x.double().cpu()
        gram += z.T @ z
        cross += z.T @ x
        sum_z, sum_x, n = sum_z + z.sum(0), sum_x + x.sum(0), n + len(x)
    mean_z, mean_x = sum_z / n, sum_x / n
    gram = gram / n - mean_z.outer(mean_z)
    cross = cross / n - mean_z.outer(mean_x)
    W_dec = sae.W_dec.double().cpu()
    weight = ridge * max(float(gram.diagonal().mean()), 1e-12)
    shrunk = gram + weight * torch.eye(d_sae, dtype=torch.float64)
    W_new = torch.linalg.solve(shrunk, cross + weight * W_dec)
    b_new = mean_x - mean_z @ W_new
    out, old_b_dec = deepcopy(sae), sae.b_dec.clone()
    out.W_dec.copy_(W_new)
    out.b_dec.copy_(b_new)
    if sae.cfg.apply_b_dec_to_input:
        shift = (out.b_dec - old_b_dec) @ sae.W_enc
        if hasattr(out, "b_gate"):
            out.b_gate.add_(shift)
            out.b_mag.add_(shift * out.r_mag.exp())
        else:
            out.b_enc.add_(shift)
    return out


def _moments(rows: Rows) -> RunningMoments:
    d_in = as_store(rows).d_in
    moments = RunningMoments(d_in)
    for x in checked_chunks(rows, d_in, rows_within(BUDGET, 2 * d_in)):
        moments.update(x)
    return moments
