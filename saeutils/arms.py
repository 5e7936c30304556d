"""From labelled stories to directions to steer along, and prompts to try them on.

A concept's latent is chosen by one of two rules: it fires ON the concept's words, or
BEFORE them, at the token whose successor is such a word. For the same two rules there
is a difference of means, which needs labels but no SAE; and random directions.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from saeutils import detection, grammar, interventions, language
from saeutils.activations import save_activations
from saeutils.detection import Member
from saeutils.examples import Codes
from saeutils.facts import row_before, row_concepts
from saeutils.splicing import edited
from saeutils.store import ActivationStore, as_store
from saeutils.stories import StoryData, Tokens, tokens
from saeutils.streaming import BUDGET, Rows, checked_chunks, rows_within

if TYPE_CHECKING:
    import pandas as pd

RULES = ("on", "before")
CONTEXT = 256  # tokens of a story at most, unless told otherwise
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


# --- words and concepts ---------------------------------------------------


def words_of(concept: str, *, n: int = 500, seed: int = 0) -> frozenset[str]:
    """The words that carry a concept in the first n stories of the grammar, lower case.

    Raises ValueError for a concept that none of them carries.
    """
    found = _carriers(n, seed)
    if concept not in found:
        raise ValueError(f"no word of {n} grammar stories carries {concept!r}")
    return frozenset(found[concept])


@cache
def _carriers(n: int, seed: int) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for story in grammar.stories(n, seed=seed):
        for word in story.words:
            for concept in word.concepts:
                found.setdefault(concept, set()).add(word.text.lower())
    return found


def contains(texts: Sequence[str], words: frozenset[str]) -> Bool[np.ndarray, " n"]:
    """Which of the texts hold at least one of the words, whole, in any case."""
    return np.array([not words.isdisjoint(_WORD.findall(t.lower())) for t in texts])


class Labelled(NamedTuple):
    """Activations of grammar stories, and the concepts of each row."""

    store: ActivationStore
    coded: Tokens
    on: Member
    """Which concepts the row's own token carries."""
    before: Member
    """Which concepts the next token carries."""


def labelled(
    model: nn.Module,
    hook: str,
    data: StoryData,
    concepts: Sequence[str],
    path: str | Path,
    *,
    context: int = CONTEXT,
    batch_size: int = 32,
) -> Labelled:
    """Saves the activations at a hook on grammar stories (of seed 0) under `path`.

    Args:
        context: tokens of a story at most.

    Raises ValueError for an unknown hook or concept.
    """
    if unknown := sorted(set(concepts) - set(grammar.concepts())):
        raise ValueError(f"no such concept: {unknown}; there are {grammar.concepts()}")
    coded = tokens(data, model.tokenizer, context)
    store = saved(model, hook, data, path, context=context, batch_size=batch_size)
    on = row_concepts(store.provenance, coded, concepts)
    return Labelled(store, coded, on, next_concepts(on, store.provenance))


def saved(
    model: nn.Module,
    hook: str,
    data: StoryData | Sequence[StoryData],
    path: str | Path,
    *,
    context: int = CONTEXT,
    batch_size: int = 32,
) -> ActivationStore:
    """The activations at a hook on all tokens of stories, with id and position.

    They lie under `path` in a folder named after the stories and the context, so that
    other stories find a place of their own, and the same ones are read back. Of
    several corpora the stories follow one another, and are numbered anew.
    """
    if not isinstance(data, StoryData):
        texts = [text for part in data for text in part.texts]
        data = StoryData(texts, np.arange(len(texts)), data[0].split, "several")
    coded = tokens(data, model.tokenizer, context)
    return save_activations(
        model,
        coded.ids,
        hook,
        Path(path) / f"{data.fingerprint[:12]}-{context}",
        provenance={"id": coded.documents},
        batch_size=batch_size,
        progress=False,
    )[hook]


def next_concepts(on: Member, records: "pd.DataFrame") -> Member:
    """Which concepts the NEXT token carries, from those of each row's own token.

    A latent that fires on a word changes what comes after it; one that fires before a
    word can bring the word itself. records: provenance of the rows (id, position).
    """
    place, out = row_before(records), np.zeros_like(on)
    out[place[place >= 0]] = on[place >= 0]
    return out


# --- latents --------------------------------------------------------------


def latents_by_rule(
    sae: Any, choose: Labelled, score: Labelled, concepts: Sequence[str]
) -> "pd.DataFrame":
    """The latent with the best F1 for each concept, by either rule.

    Latent and threshold are chosen on one set of stories (`detection.best_units`) and
    scored on the other.

    Returns concept, rule, latent, F1 (on the stories of `score`), chance (F1 there
    when each story has the labels of another one).
    """
    import pandas as pd

    records, parts = score.store.provenance, []
    own_places = [records[name].to_numpy() for name in ("id", "position")]
    for rule in RULES:
        truth = getattr(score, rule)
        found = detection.best_units(Codes(sae, choose.store), getattr(choose, rule))
        null = detection.of_other_stories(truth, *own_places)
        f1, chance = (
            detection.score(Codes(sae, score.store), member, found).f1
            for member in (truth, null)
        )
        own = {"concept": concepts, "rule": rule, "latent": found.unit}
        parts.append(pd.DataFrame(own | {"F1": f1, "chance": chance}))
    return pd.concat(parts, ignore_index=True)


def ablation_costs(
    model: nn.Module,
    hook: str,
    sae: Any,
    chosen: "pd.DataFrame",
    score: Labelled,
    *,
    n_stories: int = 40,
) -> "pd.DataFrame":
    """`chosen` with what ablating each latent adds to the loss, in nats.

    Δ its words: where a word of the concept comes next; Δ other words: elsewhere.
    """
    records = score.store.provenance
    kept = score.coded.documents[:n_stories]
    some = records[records["id"].isin(kept)]
    story = {document: i for i, document in enumerate(kept.tolist())}
    at = some["id"].map(story).to_numpy(copy=True), some["position"].to_numpy(copy=True)
    pair = language.next_tokens(model, score.coded)
    pair = tuple(part[:n_stories, : at[1].max() + 2] for part in pair)
    clean = language.loss_by_token(model, pair)[at]
    concepts = list(dict.fromkeys(chosen["concept"]))
    costs = {"Δ its words": [], "Δ other words": []}
    for concept, latent in zip(chosen["concept"], chosen["latent"], strict=True):
        with edited(model, hook, interventions.ablate(sae, [latent])):
            added = (language.loss_by_token(model, pair)[at] - clean).numpy()
        word = score.before[some.index, concepts.index(concept)]
        for column, where in zip(costs, (word, ~word), strict=True):
            mean = float(np.nanmean(added[where])) if where.any() else np.nan
            costs[column].append(mean)
    return chosen.assign(**costs)


# --- directions -----------------------------------------------------------


def directions(
    sae: Any, chosen: "pd.DataFrame", choose: Labelled, n_random: int, *, seed: int = 0
) -> dict[str, Float[Tensor, "_ d_in"]]:
    """The arms of a comparison, each a row a concept: "latent (on)", "means (on)",
    "latent (before)", "means (before)"; and "random", n_random rows."""
    arms = {}
    for rule in RULES:
        latents = chosen.loc[chosen["rule"] == rule, "latent"].tolist()
        arms[f"latent ({rule})"] = sae.W_dec[latents].detach()
        means = difference_of_means(choose.store, getattr(choose, rule))
        arms[f"means ({rule})"] = means
    return arms | {"random": random_directions(n_random, sae.W_dec.shape[1], seed=seed)}


def difference_of_means(rows: Rows, member: Member) -> Float[Tensor, "concepts d_in"]:
    """mean(x where the concept is) − mean(x where it is not), a row a concept.

    Raises ValueError for a concept that all rows carry, or none, and for labels of
    another number of rows.
    """
    n = len(as_store(rows))
    if n != len(member):
        raise ValueError(f"{n} rows of activations, {len(member)} of labels")
    counts = torch.from_numpy(member.sum(0))
    if bad := ((counts == 0) | (counts == n)).nonzero().flatten().tolist():
        raise ValueError(f"concept {bad[0]} is on none of the rows, or on all")
    d_in, at, parts = as_store(rows).d_in, 0, []
    for x in checked_chunks(rows, d_in, rows_within(BUDGET, 2 * d_in)):
        where = torch.from_numpy(member[at : at + len(x)]).double()
        x, at = x.double().cpu(), at + len(x)
        parts.append(torch.stack([where.T @ x, (1 - where).T @ x]))
    with_it, without = torch.stack(parts).sum(0)
    return (with_it / counts[:, None] - without / (n - counts)[:, None]).float()


def random_directions(n: int, d_in: int, *, seed: int = 0) -> Float[Tensor, "n d_in"]:
    """Unit vectors, uniform over all directions: the null of steering."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d_in, generator=generator), dim=1)


def beginnings(
    model: nn.Module, data: StoryData, length: int, *, seed: int = 0
) -> Int64[Tensor, "n length"]:
    """The first tokens of stories, BOS included, each beginning once, shuffled.

    Stories that end before are left out. Raises ValueError when none is left.
    """
    coded = tokens(data, model.tokenizer, length + 1)
    long = np.array([spans[-1][1] > 0 for spans in coded.spans])
    if not long.any():
        raise ValueError(f"no story has more than {length} tokens")
    found = torch.from_numpy(np.unique(coded.ids[long, :length], axis=0))
    generator = torch.Generator().manual_seed(seed)
    return found[torch.randperm(len(found), generator=generator)]
