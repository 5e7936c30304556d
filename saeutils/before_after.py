"""Does refinement help where no truth is known? One table, before and after.

Labelled          activations, and others on which concepts are known
before_after      SAEs of several seeds and their refinements: FVU at equal L0,
                  agreement of seeds, and what one latent says about a concept
concept_scores    the latent and threshold that are best for a concept, judged on
                  other rows
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from saeutils import metrics
from saeutils.refinement import refine
from saeutils.sparse_coding import SparseCoder
from saeutils.training import TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

Rows = Float[Tensor, "_ d"]
Member = Bool[np.ndarray, "_ concepts"]


class Labelled(NamedTuple):
    """Activations, and what is known of some of them."""

    rows: Any
    """Store or tensor to train and refine on."""
    held_out: Rows
    """Others, for FVU and L0."""
    choose: Rows
    member: Member
    """Which of the rows `choose` carry which concept."""
    score: Rows
    score_member: Member


class ConceptScores(NamedTuple):
    """Of each concept, on rows that nothing was chosen on."""

    f1: Float64[np.ndarray, " concepts"]
    """Of the latent and threshold with the best F1 on the rows to choose on."""
    balanced: Float64[np.ndarray, " concepts"]
    """Balanced accuracy, chosen by balanced accuracy: a 1-sparse probe; chance ½."""


def concept_scores(
    z: Float[Tensor, "n m"],
    member: Bool[np.ndarray, "n concepts"],
    z_score: Float[Tensor, "s m"],
    score_member: Bool[np.ndarray, "s concepts"],
) -> ConceptScores:
    """The best latent for each concept: z_j > t, over all latents j and all t ≥ 0.

    Raises: ValueError for a concept that is on none or on all of the rows to choose
        on, or codes that are all zero.
    """
    on = member.sum(0)
    if not (on > 0).all() or not (on < len(member)).all():
        raise ValueError("each concept must be on some rows to choose on, not on all")
    row, latent = (a.numpy() for a in z.nonzero(as_tuple=True))
    if not len(row):
        raise ValueError("all codes are zero: there is nothing to choose from")
    value = z.numpy()[row, latent]
    order = np.lexsort((-value, latent))
    row, latent, value = row[order], latent[order], value[order]
    first = np.searchsorted(latent, latent)  # place of each latent's largest code
    said = np.arange(len(row)) - first + 1  # rows on which z_j ≥ this value
    last = np.append(latent[1:] != latent[:-1], True)
    cut = (value + np.where(last, 0, np.append(value[1:], 0))) / 2
    out = np.zeros((2, member.shape[1]))
    for c, positive in enumerate(on):
        hits = np.append(0, member[row, c].cumsum())
        hits = hits[1:] - hits[first]
        recall, false = hits / positive, (said - hits) / (len(member) - positive)
        true = score_member[:, c]
        for i, score in enumerate((2 * hits / (said + positive), recall - false)):
            best = score.argmax()
            claim = z_score[:, latent[best]].numpy() > cut[best]
            both = (claim & true).sum()
            if i == 0:
                out[0, c] = 2 * both / max(claim.sum() + true.sum(), 1)
            else:
                miss = (claim & ~true).sum() / max((~true).sum(), 1)
                out[1, c] = (both / max(true.sum(), 1) + 1 - miss) / 2
    return ConceptScores(*out)


def before_after(
    data: Labelled, config: TrainConfig, *, seeds: list[int], seed: int = 0, **refining
) -> "pd.DataFrame":
    """A row for each seed and each of: the SAE; its dictionary, and the refined one,
    read by matching pursuit with k atoms; the refined one with an encoder; random
    directions read in the same way. "labels shuffled" reads the refined dictionary,
    with each row carrying the concepts of another.

    Args:
        config: of the SAEs but for the seed; k is also that of matching pursuit.
        seed: of random directions and shuffles.
        refining: as `refine` takes it.

    Returns:
        name, seed, FVU, L0, dead % (on `held_out`), agreement (of decoders of
        different seeds, `metrics.agreement`), concept F1, 1-sparse probe % (means over
        concepts of `concept_scores`).

    Raises: ValueError for fewer than two seeds.
    """
    import pandas as pd

    if len(seeds) < 2:
        raise ValueError(f"agreement needs two seeds or more, got {seeds}")
    generator = torch.Generator().manual_seed(10**6 + seed)
    k, shuffled = round(config.k), np.random.default_rng(seed)
    found: dict[str, list[Any]] = {}
    for own in seeds:
        sae = train(data.rows, replace(config, seed=own), progress=False).sae
        out = refine(sae, data.rows, seed=own, **refining)
        W = torch.randn(sae.W_dec.shape, generator=generator)
        W = torch.nn.functional.normalize(W, dim=1)
        old, new, null = (
            SparseCoder(w, b, "omp", k=k)
            for w, b in (
                (torch.nn.functional.normalize(sae.W_dec.detach(), dim=1), sae.b_dec),
                (out.coder.W_dec, out.coder.b_dec),
                (W, sae.b_dec),
            )
        )
        for name, one in (
            ("SAE", sae),
            ("refined, encoder", out.sae),
            ("SAE's dictionary, OMP", old),
            ("refined dictionary, OMP", new),
            ("labels shuffled", new),
            ("random directions, OMP", null),
        ):
            found.setdefault(name, []).append(one)
    table = []
    for name, group in found.items():
        agree = metrics.agreement([one.W_dec.detach() for one in group])
        for own, one in zip(seeds, group, strict=True):
            card = metrics.scorecard(one, data.held_out, eval_set="held out", name=name)
            member, truth = data.member, data.score_member
            if name == "labels shuffled":
                member, truth = (shuffled.permutation(m) for m in (member, truth))
            with torch.no_grad():
                z, z_score = one.encode(data.choose), one.encode(data.score)
            scores = concept_scores(z, member, z_score, truth)
            table.append(
                {
                    "name": name,
                    "seed": own,
                    "FVU": card.fvu,
                    "L0": card.l0,
                    "dead %": 100 * card.dead,
                    "agreement": agree,
                    "concept F1": scores.f1.mean(),
                    "1-sparse probe %": 100 * scores.balanced.mean(),
                }
            )
    return pd.DataFrame(table)
