"""Does refinement help where no truth is known? One table, before and after.

Labelled          activations, and others on which concepts are known
before_after      SAEs of several seeds and their refinements: FVU at equal L0,
                  agreement of seeds, and what one latent says about a concept
concept_scores    the latent and threshold that are best for a concept, judged on
                  other rows
"""

from dataclasses import replace
from pathlib import Path
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

REFINED, SHUFFLED = "refined dictionary, OMP", "labels shuffled"
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


def labelled_stories(
    model: Any,
    hook: str,
    folder: str | Path,
    *,
    corpus: str = "embedded",
    n_stories: int = 340,
    n_test: int = 25,
    least: int = 30,
) -> tuple[Labelled, list[str]]:
    """A story model's activations, with the grammar's concepts of its own stories.

    Args:
        folder: where activations are stored, or opened.
        n_stories: of the corpus, to train on.
        n_test: of the corpus, held out; and twice as many of the grammar.
        least: rows that a concept must be on, to be judged.

    Returns: the activations, and the names of the concepts.
    """
    from saeutils import grammar
    from saeutils.facts import row_concepts
    from saeutils.stories import stories
    from saeutils.story_rows import story_rows

    def saved(text):
        return story_rows(model, text, [hook], folder)

    names, parts = grammar.concepts(), []
    for split in ("train", "test"):
        own = saved(stories(split, "grammar", n=n_test))
        labels = row_concepts(own.records, own.coded, names)
        parts.append((own.stores[hook][:], labels))
    often = np.all([member.sum(0) >= least for _, member in parts], axis=0)
    (choose, member), (score, score_member) = parts
    data = Labelled(
        saved(stories("train", corpus, n=n_stories)).stores[hook],
        saved(stories("test", corpus, n=n_test)).stores[hook][:],
        choose,
        member[:, often],
        score,
        score_member[:, often],
    )
    return data, [name for name, kept in zip(names, often, strict=True) if kept]


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
    k, table, decoders = round(config.k), [], {}
    for own in seeds:
        sae = train(data.rows, replace(config, seed=own), progress=False).sae
        out = refine(sae, data.rows, seed=own, **refining)
        old = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
        W = torch.randn(old.shape, generator=generator)
        W = torch.nn.functional.normalize(W, dim=1)
        every = {
            "SAE": sae,
            "refined, encoder": out.sae,
            "SAE's dictionary, OMP": SparseCoder(old, sae.b_dec, "omp", k=k),
            REFINED: SparseCoder(out.coder.W_dec, out.coder.b_dec, "omp", k=k),
            "random directions, OMP": SparseCoder(W, sae.b_dec, "omp", k=k),
        }
        for name, one in every.items():
            decoders.setdefault(name, []).append(one.W_dec.detach())
            table += _rows(name, one, data, own)
    agree = {name: metrics.agreement(Ws) for name, Ws in decoders.items()}
    frame = pd.DataFrame(table)
    frame.insert(5, "agreement", frame["name"].map(agree))
    order = {name: i for i, name in enumerate(frame["name"].unique())}
    return frame.sort_values("name", key=lambda names: names.map(order), kind="stable")


@torch.no_grad()
def _rows(name: str, one: Any, data: Labelled, seed: int) -> list[dict[str, Any]]:
    """The scores of one dictionary, and for the refined one those without labels."""
    card = metrics.scorecard(one, data.held_out, eval_set="held out", name=name)
    row = {"seed": seed, "FVU": card.fvu, "L0": card.l0, "dead %": 100 * card.dead}
    z, z_score = one.encode(data.choose), one.encode(data.score)
    labels = {name: (data.member, data.score_member)}
    if name == REFINED:
        shuffled = np.random.default_rng(seed).permutation
        labels[SHUFFLED] = shuffled(data.member), shuffled(data.score_member)
    out = []
    for own, (member, score_member) in labels.items():
        scores = concept_scores(z, member, z_score, score_member)
        means = scores.f1.mean(), 100 * scores.balanced.mean()
        shown = row if own == name else {"seed": seed}
        out.append({"name": own} | shown)
        out[-1] |= dict(zip(("concept F1", "1-sparse probe %"), means, strict=True))
    return out
