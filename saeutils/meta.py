"""Meta-SAE: an SAE on the decoder rows of another, and what chance would explain.

Its data are the base SAE's decoder rows: a row is a latent, and no image ever passes
through. It says of which directions the latents are made. A tower of SAEs on codes,
where a row is an image, is another thing: see `saeutils.tower`.

Source: Bussmann, Pearce, Leask et al. (2024), "Showing SAE latents are not atomic
using meta-SAEs"; 49,152 latents, 2,304 meta-latents, k 4, 55.47 % explained.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from saeutils.examples import TopExamples
from saeutils.metrics import Autoencoder
from saeutils.objectives import Penalty, sparse_step
from saeutils.sae import export, initial_params
from saeutils.store import TensorStore
from saeutils.training import TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

# Seeds are shifted by these: with the base SAE's own seed a meta-SAE would start at the
# very directions that the base's decoder rows started from, and find them again.
META, GAUSSIAN, ISOTROPIC = 1_000_003, 2_000_003, 3_000_017


class Split(NamedTuple):
    """Numbers of the rows that a meta-SAE is trained on, and of those kept out."""

    train: Int64[Tensor, " n"]
    held_out: Int64[Tensor, " m"]


@dataclass(frozen=True, eq=False)
class MetaSAE:
    """An SAE on the decoder rows of another, with what it explains of them."""

    sae: Any
    """A stock sae_lens SAE for rows of length 1; its `W_dec` are the meta-latents."""
    k: int | float
    """Meta-latents a base latent, on average."""
    rows: Split
    """Numbers of the base latents it was trained on, and of the others."""
    explained: float
    """`explained` on the rows kept out."""
    explained_in_sample: float
    """The same on the rows it was trained on: flatters."""

    def codes(
        self, W_dec: Float[Tensor, "d_base d_in"]
    ) -> Float[Tensor, "d_base d_sae"]:
        """Meta-latents of each base latent, k on average over all of them."""
        return codes_at(self.sae, F.normalize(W_dec, dim=1), self.k)


def split_rows(n: int, held_out: int | float = 0.2, seed: int = 0) -> Split:
    """n numbers, drawn apart at random."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    kept = round(held_out * n)
    return Split(order[kept:].sort().values, order[:kept].sort().values)


def train_meta(
    W_dec: Float[Tensor, "d_base d_in"],
    d_sae: int,
    *,
    k: int | float = 4,
    held_out: int | float = 0.2,
    steps: int = 300,
    batch_size: int = 256,
    lr: int | float = 2e-3,
    seed: int = 0,
) -> MetaSAE:
    """A BatchTopK SAE on decoder rows of length 1, scored on rows it never saw.

    Give it the rows of live latents only: a dead latent's row is a random start.

    Args:
        d_sae: meta-latents; published: 1/21 of the base latents.
        held_out: share of the rows kept out of training.
        seed: of the start values; and of the split, so that nulls share it.

    Raises:
        ValueError: rows without length, or so few that nothing could be kept out.
    """
    rows, split = _unit_rows(W_dec, held_out, seed)
    size = min(batch_size, len(split.train))
    config = TrainConfig(
        "batchtopk",
        d_sae,
        k,
        lr=lr,
        steps=steps,
        batch_size=size,
        seed=META + seed,
        data_seed=seed,
        dead_after=10 * size,
    )
    sae = train(rows[split.train], config, progress=False).sae
    return _scored(sae, k, rows, split)


def refit_encoder(
    W_dec: Float[Tensor, "d_base d_in"],
    dictionary: Float[Tensor, "d_sae d_in"],
    *,
    k: int | float = 4,
    held_out: int | float = 0.2,
    steps: int = 300,
    batch_size: int = 256,
    lr: int | float = 2e-3,
    seed: int = 0,
) -> MetaSAE:
    """`train_meta` with a dictionary that is given and stays; only its encoder learns.

    With the decoder of a smaller SAE as `dictionary`, the question is whether the
    meta-SAE finds anything that a smaller SAE does not.
    """
    rows, split = _unit_rows(W_dec, held_out, seed)
    data, scale = rows[split.train], rows.shape[1] ** 0.5
    params = initial_params("batchtopk", len(dictionary), scale * data.mean(0))
    params["W_dec"] = F.normalize(dictionary.detach().clone().float(), dim=1)
    params["W_enc_T"] = params["W_dec"].clone()
    learned = [params["W_enc_T"].requires_grad_(), params["b_enc"].requires_grad_()]
    optimiser = torch.optim.Adam(learned, lr=lr, fused=True)
    size = min(batch_size, len(data))
    penalty = Penalty("batchtopk", k)
    for batch in TensorStore(data).batches(size, seed=seed, steps=steps):
        frozen = {name: p.detach() for name, p in params.items()}
        grads = sparse_step(frozen, scale * batch.rows, penalty).grads
        for name in ("W_enc_T", "b_enc"):
            params[name].grad = grads[name]
        optimiser.step()
    params = {name: p.detach() for name, p in params.items()}
    sae = export(params, "batchtopk", input_scale=scale)
    return _scored(sae, k, rows, split)


def gaussian_rows(
    W_dec: Float[Tensor, "d_base d_in"], seed: int = 0
) -> Float[Tensor, "d_base d_in"]:
    """As many rows of length 1, Gaussian before that, with the rows' own mean and
    covariance: what a meta-SAE explains of these is due to the covariance alone."""
    rows = F.normalize(W_dec.detach().double(), dim=1)
    variance, axes = torch.linalg.eigh(torch.cov(rows.T, correction=0))
    generator = torch.Generator().manual_seed(GAUSSIAN + seed)
    normal = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    drawn = normal * variance.clamp(min=0).sqrt() @ axes.T + rows.mean(0)
    return F.normalize(drawn, dim=1).float()


def isotropic_rows(
    W_dec: Float[Tensor, "d_base d_in"], seed: int = 0
) -> Float[Tensor, "d_base d_in"]:
    """As many random directions."""
    generator = torch.Generator().manual_seed(ISOTROPIC + seed)
    return F.normalize(torch.randn(*W_dec.shape, generator=generator), dim=1)


@torch.no_grad()
def codes_at(
    sae: Any, rows: Float[Tensor, "n d_in"], k: int | float
) -> Float[Tensor, "n d_sae"]:
    """The k · n largest positive pre-activations of these rows; the others are zero.

    In place of the threshold stored in a BatchTopK SAE, which was set on the rows it
    was trained on: rows it never saw exceed that several times as often, and what is
    explained with 14 latents a row says nothing about 4.
    """
    pre = ((rows - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    kept = pre.flatten().topk(min(pre.numel(), int(k * len(rows)))).indices
    return (
        torch.zeros_like(pre)
        .view(-1)
        .index_copy_(0, kept, pre.flatten()[kept])
        .view_as(pre)
    )


@torch.no_grad()
def explained(sae: Any, rows: Float[Tensor, "n d_in"], k: int | float) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − mean‖² with k latents a row on average (`codes_at`)."""
    out = codes_at(sae, rows, k) @ sae.W_dec + sae.b_dec
    error = (rows - out).double().square().sum()
    return 1 - (error / (rows - rows.mean(0)).double().square().sum()).item()


def compare(
    decoders: Mapping[int, Float[Tensor, "_ d_in"]],
    widths: Mapping[str, int],
    *,
    smaller: Mapping[str, Sequence[Float[Tensor, "_ d_in"]]] | None = None,
    **options: Any,
) -> "pd.DataFrame":
    """Meta-SAEs of several base SAEs beside their nulls: one row a fit.

    Columns: width (as named), base (key in `decoders`), name, explained and
    in_sample (share of variance), excess (explained − that of Gaussian rows of the
    same base and width).

    Args:
        decoders: rows of the live latents of each base SAE.
        widths: number of meta-latents by name.
        smaller: by name of the width, for each base, the decoder of an SAE of that
            width on the same activations.
        options: of `train_meta`, e.g. k and steps.
    """
    import pandas as pd

    out = []
    for width, d_sae in widths.items():
        for i, (base, W_dec) in enumerate(decoders.items()):
            kinds = {
                "decoder rows": W_dec,
                "Gaussian rows": gaussian_rows(W_dec, seed=i),
                "isotropic rows": isotropic_rows(W_dec, seed=i),
            }
            fits = {
                name: train_meta(rows, d_sae, seed=i, **options)
                for name, rows in kinds.items()
            }
            if smaller is not None:
                fits["smaller SAE's decoder"] = refit_encoder(
                    W_dec, smaller[width][i], seed=i, **options
                )
            null = fits["Gaussian rows"].explained
            for name, fit in fits.items():
                row = dict(width=width, base=base, name=name)
                row |= dict(in_sample=fit.explained_in_sample, explained=fit.explained)
                out.append(row | dict(excess=fit.explained - null))
    return pd.DataFrame(out)


class ThroughLatents:
    """Meta-latents of an activation by way of the base latents: z · C, where z is the
    base SAE's code and C (d_base, d_meta) the meta-latents of each base latent.

    Has what `examples.Codes` needs.
    """

    def __init__(
        self,
        base: Autoencoder,
        meta: MetaSAE,
        live: Bool[Tensor, " d_base"] | None = None,
    ):
        W_dec = base.W_dec.detach()
        live = torch.ones(len(W_dec), dtype=torch.bool) if live is None else live
        self.base, self.W_dec = base, meta.sae.W_dec
        self.members = W_dec.new_zeros(len(W_dec), len(self.W_dec))
        self.members[live] = meta.codes(W_dec[live])

    def encode(self, x: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_meta"]:
        return self.base.encode(x) @ self.members


@torch.no_grad()
def purity(
    members: Float[Tensor, "d_base d_meta"], classes: Int64[Tensor, " d_base"]
) -> float:
    """How far the base latents of a meta-latent belong to one class: of each
    meta-latent's weight the part on its commonest class, mean over meta-latents.

    Args:
        members: meta-latents of each base latent (`MetaSAE.codes`).
        classes: of each base latent; shuffled ones give the null. Negative: left out.
    """
    kept = classes >= 0
    one_hot = F.one_hot(classes[kept]).to(members)
    mass = members[kept].T @ one_hot
    used = mass.sum(1) > 0
    return (mass[used].amax(1) / mass[used].sum(1)).double().mean().item()


def overlap(a: TopExamples, b: TopExamples) -> Float[Tensor, " d_meta"]:
    """Share of the items that each latent's two sets of examples have in common
    (Jaccard: of those in either); NaN where both are empty."""
    shares = []
    for one, other in zip(a, b, strict=True):
        ids, more = set(one.ids.tolist()), set(other.ids.tolist())
        shares.append(len(ids & more) / len(ids | more) if ids | more else math.nan)
    return torch.tensor(shares)


def _unit_rows(
    W_dec: Tensor, held_out: float, seed: int
) -> tuple[Float[Tensor, "d_base d_in"], Split]:
    norms = W_dec.detach().norm(dim=1)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        bad = (~((norms > 0) & norms.isfinite())).nonzero()[0].item()
        raise ValueError(
            f"decoder row {bad} has length {norms[bad]:g}: leave out dead latents, "
            "W_dec[live]"
        )
    split = split_rows(len(W_dec), held_out, seed)
    if min(map(len, split)) < 2:
        raise ValueError(
            f"{len(W_dec)} rows, of which {held_out:.0%} are kept out: two rows or "
            "more are needed on each side"
        )
    return F.normalize(W_dec.detach().float(), dim=1), split


def _scored(sae: Any, k: int | float, rows: Tensor, split: Split) -> MetaSAE:
    train_rows, others = rows[split.train], rows[split.held_out]
    scores = explained(sae, others, k), explained(sae, train_rows, k)
    return MetaSAE(sae, k, split, *scores)
