"""One row of scores for the latents of an SAE on a classifier: are they of use?

For tables that compare subjects, bases and recipes: `notebooks/16_…` is one.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from saeutils import metrics
from saeutils.attribution import share_on
from saeutils.baselines import PCA
from saeutils.datasets import ImageData
from saeutils.models import activations_at, hook_point
from saeutils.probing import k_means, single_probes, sparse_probes

#: Column -> +1 if more of it is better, −1 if less is.
BETTER = {
    "FVU": -1,
    "Δ accuracy (points)": 1,
    "1-sparse probe %": 1,
    "dead %": -1,
    "junk share %": -1,
    "NMI": 1,
}


def usefulness(
    sae: Any,
    model: nn.Module,
    hook: str,
    train: ImageData,
    test: ImageData,
    junk: Bool[Tensor, " pixels"],
    *,
    name: str,
    k: int,
    probed: int = 3000,
    clustered: int = 3000,
    seed: int = 0,
) -> dict[str, str | float | int]:
    """Scores of a sae_lens SAE, or of a control with `W_dec` alone, on test images.

    Returns:
        name, seed; accuracy % (of the model itself); FVU; FVU of PCA (of as many
        components as latents may fire, `k`: the null of FVU); L0; dead %;
        Δ accuracy (points) with the reconstruction spliced in;
        1-sparse probe % (balanced accuracy of `probing.sparse_probes` with one latent,
        trained on the first `probed` images, the mean over classes; chance is 50);
        junk share % (of |∂ pre-activation / ∂ pixel| on the pixels of `junk`, for a
        latent that fires on the image, drawn at random for each);
        NMI (of `probing.k_means` on the codes at length 1 with the labels, on the
        first `clustered` test images; chance is near 0).
    """
    rows, held_out = (activations_at(model, hook, data) for data in (train, test))
    card = metrics.scorecard(
        sae, held_out, eval_set="test", model=model, hook=hook, data=test
    )
    z, z_test = _codes(sae, rows[:probed]), _codes(sae, held_out)
    unit, fires = firing_unit(z_test, seed)
    gradients = input_gradients(model, hook, sae, test.take(fires).pixels, unit)
    pca = PCA(rows, min(k, rows.shape[1]))
    known = z, train.labels[:probed]
    single = single_probes(*known, most=8, tolerance=1e-5)  # enough to choose by
    probes = sparse_probes(*known, z_test, test.labels, ks=(1,), single=single)
    few = slice(0, clustered)
    clusters = k_means(
        z_test[few], test.labels[few], normalise=True, starts=2, seed=seed
    )
    return {
        "name": name,
        "seed": seed,
        "accuracy %": 100 * card.in_model.clean.accuracy,
        "FVU": card.fvu,
        "FVU of PCA": metrics.scorecard(pca, held_out, eval_set="test").fvu,
        "L0": card.l0,
        "dead %": 100 * card.dead,
        "Δ accuracy (points)": 100 * card.in_model.delta_accuracy,
        "1-sparse probe %": 100 * float(probes["score"].mean()),
        "junk share %": 100 * share_on(gradients, junk),
        "NMI": clusters.nmi,
    }


def _codes(sae: Any, rows: Tensor) -> Tensor:
    return torch.cat([sae.encode(part) for part in rows.split(2048)])


def firing_unit(
    z: Float[Tensor, "n d_sae"], seed: int = 0
) -> tuple[Int64[Tensor, " m"], Int64[Tensor, " m"]]:
    """For each row where any fires, one latent that does, at random; and which rows."""
    fires = z != 0
    some = fires.any(1).nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(fires[some].float(), 1, generator=generator)[:, 0], some


def input_gradients(
    model: nn.Module,
    hook: str,
    sae: Any,
    pixels: Float[Tensor, "n pixels"],
    unit: Int64[Tensor, " n"],
) -> Float[Tensor, "n pixels"]:
    """∂/∂x of the pre-activation of one latent a row: of a(x) · W_enc[:, unit].

    A control without `W_enc` reads with W_decᵀ, as `baselines` do.
    """
    W_enc_T = sae.W_enc.T if hasattr(sae, "W_enc") else sae.W_dec
    heard = []
    handle = hook_point(model, hook).register_forward_hook(
        lambda *call: heard.append(call[-1])
    )
    x = pixels.detach().clone().requires_grad_()
    try:
        model(x)
    finally:
        handle.remove()
    read = (heard[0] * W_enc_T[unit].detach()).sum()
    return torch.autograd.grad(read, x)[0]
