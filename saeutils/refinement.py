"""Recover features that an SAE missed: sparse inference and exact atom updates.

    refined = refine(sae, rows)
    refined.coder       the refined dictionary with sparse inference (best codes)
    refined.sae         the same dictionary with an encoder: a stock sae_lens SAE

An SAE's encoder confuses features that interfere, and its decoder learns from these
codes. Refinement alternates the two halves of dictionary learning instead:

    codes   z = argmin_{z≥0} ½‖x − b − zW‖² + λ Σ z, fitted again without the penalty,
            codes below 2λ dropped                              (`sparse_coding.lasso`)
    atoms   one exact minimisation over each atom in turn, given the codes' sums
            A = Σ zᵀz and B = Σ zᵀ(x − b), then length 1
    repair  atoms that fire together are learned anew (`regrouping`); unused atoms and
            duplicates start anew from what is left of rows that are badly explained;
            absorbed atoms are taken apart (`absorption`)

λ is 0.15 of the typical size of a code, which is measured, not known. Nothing here
looks at a ground truth. Sources: Mairal, Bach, Ponce and Sapiro (2009), for the atom
updates; Smith and Elad (2013), for pruning and new atoms.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from saeutils.absorption import take_apart
from saeutils.regrouping import regroup
from saeutils.sae import export
from saeutils.sparse_coding import SparseCoder, SparseCodes
from saeutils.store import as_store

PENALTY = 0.15  # λ, in typical codes
DUPLICATE = 0.9  # cosine


@dataclass(frozen=True, eq=False)
class Refined:
    """What refinement gives back."""

    coder: SparseCoder
    """Refined dictionary, codes by sparse inference."""
    sae: Any
    """Refined dictionary, codes by an encoder fitted to those: a sae_lens SAE."""
    history: Any
    """DataFrame, a row a round: fvu and l0 of the codes, degrees that an atom turned
    (mean), groups learned anew, atoms taken apart, new atoms."""


@torch.no_grad()
def refine(
    sae,
    rows,
    *,
    rounds: int = 20,
    batch: int = 16_384,
    penalty: int | float = PENALTY,
    groups: bool = True,
    absorption: bool = True,
    encoder: bool = True,
    seed: int = 0,
) -> Refined:
    """Refine the dictionary of `sae` on `rows`, then fit an encoder to it.

    Args:
        sae: any trained SAE (`encode`, `W_dec`, `b_dec`), or a `Dictionary`.
        rows: store, path or tensor, as for `train`.
        rounds: of codes, atoms and repair; each on the next `batch` rows. The last
            quarter starts no atom anew.
        penalty: λ in typical codes.
        groups: whether atoms that fire together are learned anew, after each round
            until it changes none (not in the last quarter).
        absorption: whether absorbed atoms are taken apart, in the last quarter.
        encoder: whether an encoder is fitted; else `sae` of the result is None.

    Raises: ValueError for fewer rounds than 1, rows of another width, or an SAE that
        does not fire on them.
    """
    import pandas as pd

    store = as_store(rows)
    W, b = sae.W_dec.detach().float(), sae.b_dec.detach().float().clone()
    if store.d_in != W.shape[1]:
        raise ValueError(
            f"the rows have d_in = {store.d_in}, the SAE has {W.shape[1]}: were they "
            "saved at another hook point?"
        )
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    W = torch.nn.functional.normalize(W, dim=1)
    generator = torch.Generator().manual_seed(seed)
    size, width = typical_code(sae, store[:2048])
    history = []
    batches = store.batches(min(batch, len(store)), seed=seed, steps=rounds, workers=0)
    for number, (x, _) in enumerate(batches):
        coder = SparseCoder(W, b, penalty=penalty * size, width=width, sweeps=100)
        codes = coder.sparse(x - b)
        A, B, used = sums(codes, x - b, len(W))
        before, W = W, update_atoms(W, A, B)
        turned = (W * before).sum(1).clamp(-1, 1).acos()
        left = x - b - codes.times(W)
        b = b + left.mean(0)
        on = codes.value > 0
        # λ never falls: else, where nothing is exactly sparse, a smaller λ gives
        # smaller codes, which ask for a smaller λ …
        size = max(size, codes.value[on].median().item())
        apart = new = changed = 0
        # Late: merged atoms are told apart best once they have fully merged.
        if absorption and number >= rounds * 3 // 4:
            W, apart = take_apart(W, codes, left, least=size / 10)
        if number < rounds * 3 // 4:
            if groups:  # until a round changes nothing
                W, changed = regroup(W, codes, left, penalty * size)
                groups = changed > 0
                used = torch.where(W.norm(dim=1) > 0, used.max(), 0)
            W, new = reseed(W, used, left, generator)
        history.append(
            {
                "round": number,
                "fvu": (left.square().sum() / (x - x.mean(0)).square().sum()).item(),
                "l0": on.sum().item() / len(x),
                "turned": torch.rad2deg(turned).mean().item(),
                "taken apart": apart,
                "regrouped": changed,
                "new": new,
            }
        )
    coder = SparseCoder(W, b, penalty=penalty * size)
    fitted = fit_encoder(coder, store, batch=batch, seed=seed) if encoder else None
    return Refined(coder, fitted, pd.DataFrame(history))


def typical_code(sae, x: Float[Tensor, "rows d"]) -> tuple[float, int]:
    """Median of the codes that are not zero, in units of x, and a generous bound on
    how many codes a row needs: four times as many as the SAE uses.

    Raises: ValueError when no latent fires.
    """
    z = sae.encode(x) * sae.W_dec.detach().norm(dim=1)
    fires = z > 0
    if not fires.any():
        raise ValueError("the SAE does not fire on these rows: nothing to refine")
    width = round(4 * fires.sum(1).double().mean().item())
    return z[fires].median().item(), max(8, min(width, len(z[0])))


def sums(
    codes: SparseCodes, centred: Float[Tensor, "rows d"], m: int
) -> tuple[Float[Tensor, "m m"], Float[Tensor, "m d"], Int64[Tensor, " m"]]:
    """Σ zᵀz, Σ zᵀ(x − b), and the number of rows of each atom."""
    from saeutils._coding_kernels import statistics

    A, B = torch.zeros(m, m), torch.zeros(m, centred.shape[1])
    used = torch.zeros(m, dtype=torch.int64)
    arrays = [t.contiguous().numpy() for t in (*codes, centred, A, B, used)]
    statistics(*arrays)
    return A, B, used


def update_atoms(
    W: Float[Tensor, "m d"],
    A: Float[Tensor, "m m"],
    B: Float[Tensor, "m d"],
    sweeps: int = 3,
) -> Float[Tensor, "m d"]:
    """Minimises ‖X − ZW‖² over each row of W in turn, the others fixed.

    W_j ← W_j + (B_j − A_j W) / A_jj, then length 1. Unused atoms stay.
    """
    from saeutils._coding_kernels import atom_sweep

    out = W.clone().contiguous()
    arrays = [t.contiguous().numpy() for t in (out, A, B)]
    for _ in range(sweeps):
        atom_sweep(*arrays)
    return out


def reseed(
    W: Float[Tensor, "m d"],
    used: Int64[Tensor, " m"],
    left: Float[Tensor, "rows d"],
    generator: torch.Generator,
    fewest: int = 2,
) -> tuple[Float[Tensor, "m d"], int]:
    """Unused atoms, and the rarer of two duplicates, become residuals of bad rows.

    A row that misses one feature leaves that feature's direction. New atoms are kept
    apart from each other (cosine ≤ 0.7): the worst rows may miss the same one.
    """
    order = used.argsort(descending=True)
    again = ((W[order] @ W[order].T).tril(-1) > DUPLICATE).any(1)
    free = used < fewest
    free[order[again]] = True
    spots = free.nonzero().flatten()
    size = left.norm(dim=1)
    worst = size.topk(min(len(left), max(20 * len(spots), 1))).indices
    worst = worst[torch.randperm(len(worst), generator=generator)]
    chosen: list[Tensor] = []
    for row in worst.tolist():
        if len(chosen) == len(spots):
            break
        new = left[row] / size[row].clamp_min(1e-12)
        if not chosen or (torch.stack(chosen) @ new).max() <= 0.7:
            chosen.append(new)
    if chosen:
        W = W.clone()
        W[spots[: len(chosen)]] = torch.stack(chosen)
    return W, len(chosen)


@torch.no_grad()
def fit_encoder(coder: SparseCoder, rows, *, batch: int = 16_384, seed: int = 0):
    """The best linear encoder for a dictionary, with one threshold a latent.

    Least squares from x to the codes of sparse inference; each latent's threshold is
    the one with the best F1 against these codes (firing or not), and its scale fits
    the codes where it fires. A stock sae_lens JumpReLU SAE.
    """
    store = as_store(rows)
    W, b = coder.W_dec, coder.b_dec
    (x, _), *_ = store.batches(
        min(batch, len(store)), seed=seed + 1, steps=1, workers=0
    )
    codes = coder.sparse(x - b)
    z = codes.dense(len(W))
    centred = torch.cat([x - b, torch.ones(len(x), 1)], 1).double()
    gram = centred.T @ centred
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    solution = torch.linalg.solve(gram, centred.T @ z.double()).float()
    pre = (x - b) @ solution[:-1] + solution[-1]
    threshold = torch.cat(
        [
            best_threshold(p, y > 0)
            for p, y in zip(pre.split(256, 1), z.split(256, 1), strict=True)
        ]
    )
    fires = pre > threshold
    scale = (z * pre * fires).sum(0) / (pre.square() * fires).sum(0).clamp_min(1e-12)
    scale = torch.where(scale > 0, scale, 1.0)
    params = {
        "W_enc_T": (solution[:-1] * scale).T.contiguous(),
        "b_enc": solution[-1] * scale,
        "W_dec": W,
        "b_dec": b,
        "threshold": threshold * scale,
    }
    return export(params, "jumprelu", metadata={"refined": True})


def best_threshold(
    score: Float[Tensor, "rows m"], fires: Bool[Tensor, "rows m"]
) -> Float[Tensor, " m"]:
    """Of each column the threshold t ≥ 0 for which score > t has the best F1."""
    order = score.argsort(dim=0, descending=True)
    hits = fires.gather(0, order).cumsum(0)
    rank = torch.arange(1, len(score) + 1)[:, None]
    f1 = 2 * hits / (rank + fires.sum(0))
    ordered = score.gather(0, order)
    f1 = f1.masked_fill(ordered <= 0, -1)
    best = f1.argmax(0, keepdim=True)
    below = torch.cat([ordered[1:], ordered[-1:] - 1]).gather(0, best)
    return ((ordered.gather(0, best) + below) / 2).clamp_min(0)[0]


@torch.no_grad()
def with_l0(sae, rows, l0: int | float, *, batch: int = 8192):
    """The same SAE with one threshold for all latents, so that `l0` fire on average.

    For SAEs that say more than they should (L1, or TopK trained with a large k): a
    stock JumpReLU SAE with the same weights. L0 on the first `batch` rows.

    Raises: ValueError when even without a threshold fewer than `l0` fire.
    """
    x = as_store(rows)[:batch]
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if not sae.cfg.apply_b_dec_to_input:
        pre = x @ sae.W_enc + sae.b_enc
    wanted = round(l0 * len(x))
    if (pre > 0).sum() < wanted:
        raise ValueError(f"fewer than {l0} latents are ever positive on these rows")
    threshold = pre.flatten().kthvalue(pre.numel() - wanted).values
    params = {
        "W_enc_T": sae.W_enc.T.contiguous(),
        "b_enc": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
        "threshold": torch.zeros_like(sae.b_enc) + threshold,
    }
    return export(params, "jumprelu", pre_encoder_bias=sae.cfg.apply_b_dec_to_input)
