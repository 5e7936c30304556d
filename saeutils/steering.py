"""What an edit does to a language model: how far it moves, what it wins and costs.

Directions to steer along, lengths that move the model equally far, the share of texts
in which a concept's words appear, and what the text costs the untouched model.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from saeutils import grammar, interventions
from saeutils.detection import Member
from saeutils.labels import row_before
from saeutils.store import as_store
from saeutils.story_models import continued
from saeutils.streaming import BUDGET, Rows, checked_chunks, rows_within

if TYPE_CHECKING:
    import pandas as pd


# --- concepts and directions ----------------------------------------------


def words_of(concept: str, *, n: int = 1_000, seed: int = 0) -> frozenset[str]:
    """The words that carry a concept in the first n stories of the grammar, lower case.

    Raises ValueError for a concept that none of them carries.
    """
    found = {
        word.text.lower()
        for story in grammar.stories(n, seed=seed)
        for word in story.words
        if concept in word.concepts
    }
    if not found:
        raise ValueError(f"no word of {n} grammar stories carries {concept!r}")
    return frozenset(found)


def contains(texts: Sequence[str], words: frozenset[str]) -> Bool[np.ndarray, " n"]:
    """Which of the texts hold at least one of the words, whole, in any case."""
    return np.array([not words.isdisjoint(_WORD.findall(t.lower())) for t in texts])


_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def next_concepts(on: Member, records: "pd.DataFrame") -> Member:
    """Which concepts the NEXT token carries, from those of each row's own token.

    A latent that fires on a word changes what comes after it; one that fires before a
    word can bring the word itself. records: provenance of the rows (id, position).
    """
    place, out = row_before(records), np.zeros_like(on)
    out[place[place >= 0]] = on[place >= 0]
    return out


def difference_of_means(rows: Rows, member: Member) -> Float[Tensor, "concepts d_in"]:
    """mean(x where the concept is) − mean(x where it is not), a row a concept.

    Raises ValueError for a concept that all rows carry, or none.
    """
    counts = torch.from_numpy(member.sum(0))
    if (
        bad := (counts == 0)
        .logical_or(counts == len(member))
        .nonzero()
        .flatten()
        .tolist()
    ):
        raise ValueError(f"concept {bad[0]} is on none of the rows, or on all")
    parts, at = [], 0
    d_in = as_store(rows).d_in
    for x in checked_chunks(rows, d_in, rows_within(BUDGET, 2 * d_in)):
        where = torch.from_numpy(member[at : at + len(x)]).double()
        x, at = x.double().cpu(), at + len(x)
        parts.append(torch.stack([where.T @ x, (1 - where).T @ x]))
    if at != len(member):
        raise ValueError(f"{at} rows of activations, {len(member)} of labels")
    with_it, without = torch.stack(parts).sum(0)
    mean = with_it / counts[:, None] - without / (at - counts)[:, None]
    return mean.float()


def random_directions(n: int, d_in: int, *, seed: int = 0) -> Float[Tensor, "n d_in"]:
    """Unit vectors, uniform over all directions: the null of steering."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d_in, generator=generator), dim=1)


# --- how far the model moves ----------------------------------------------


def divergence(
    clean: Float[Tensor, "... vocabulary"], other: Float[Tensor, "... vocabulary"]
) -> Float[Tensor, "..."]:
    """KL(clean ‖ other) = Σ p (log p − log q) between next-token logits, in nats."""
    p, q = clean.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def kl_by_length(
    model: nn.Module,
    hook: str,
    directions: Float[Tensor, "m d_in"],
    lengths: Sequence[int | float],
    ids: Int64[Tensor, "n positions"],
    *,
    batch_size: int = 32,
) -> Float[Tensor, "m lengths"]:
    """Mean KL (nats a token) when length · direction is added at every position.

    Directions are taken at length 1.
    """
    unit = F.normalize(directions, dim=1)
    total = torch.zeros(len(unit), len(lengths), dtype=torch.float64)
    for batch in ids.split(batch_size):
        clean = interventions.run(model, batch)
        for i, direction in enumerate(unit):
            for j, length in enumerate(lengths):
                edit = {hook: interventions.push(direction, length)}
                moved = divergence(clean, interventions.run(model, batch, edit))
                total[i, j] += moved.double().sum().item()
    return (total / ids.numel()).float()


def lengths_for(
    model: nn.Module,
    hook: str,
    directions: Float[Tensor, "m d_in"],
    ids: Int64[Tensor, "n positions"],
    kl: int | float,
    *,
    start: int | float = 1.0,
    tolerance: float = 0.03,
) -> Float[Tensor, " m"]:
    """How long each direction must be to move the model by `kl` nats a token.

    The mean KL of `kl_by_length` is within `tolerance` of kl, as a share. For small
    lengths KL grows with their square, which is where the search begins. The clean
    predictions on ids are held: keep ids few.

    Raises ValueError when a direction does not get there at 2,000 times `start`.
    """
    if not kl > 0:
        raise ValueError(f"kl must be positive, got {kl}")
    clean = interventions.run(model, ids)
    found = []
    for number, direction in enumerate(F.normalize(directions, dim=1)):

        def reached(length: float, direction: Tensor = direction) -> float:
            edit = {hook: interventions.push(direction, length)}
            return divergence(clean, interventions.run(model, ids, edit)).mean().item()

        low, high, length = 0.0, float("inf"), float(start)
        for _ in range(40):
            here = reached(length)
            if abs(here / kl - 1) < tolerance:
                break
            low, high = (length, high) if here < kl else (low, length)
            guess = length * min(max((kl / max(here, 1e-12)) ** 0.5, 0.1), 4.0)
            if not low < guess < high:  # KL need not grow like a square: bisect
                guess = (low + high) / 2 if high < float("inf") else 2 * low
            length = guess
            if length > 2_000 * start:
                raise ValueError(
                    f"direction {number} moves the model by {here:.3g} nats at length "
                    f"{low:.3g}, and never by {kl}: the hook hardly matters along it"
                )
        found.append(length)
    return torch.tensor(found)


def gains(
    model: nn.Module,
    ids: Int64[Tensor, "n positions"],
    edits: Mapping[str, Callable[[Tensor], Tensor]],
) -> Float[Tensor, "n positions"]:
    """log p with the edits − log p without, of each token (nats); NaN for the first."""
    logs = []
    for some in (edits, {}):
        logits = interventions.run(model, ids, some)[:, :-1].float().cpu()
        logs.append(-F.cross_entropy(logits.mT, ids[:, 1:], reduction="none"))
    return F.pad(logs[0] - logs[1], (1, 0), value=float("nan"))


# --- what it wins and costs -----------------------------------------------


def wilson(hits: int | np.integer, n: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a share: all rates p with |hits/n − p| ≤ z √(p (1 − p) / n).

    Source: Wilson, 1927. Raises ValueError unless 0 ≤ hits ≤ n and n ≥ 1.
    """
    from scipy.stats import norm

    if not 0 <= hits <= n or n < 1:
        raise ValueError(f"{hits} hits of {n}: expected 0 ≤ hits ≤ n and n ≥ 1")
    z, share = norm.ppf((1 + level) / 2), hits / n
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return float(max(0, centre - half)), float(min(1, centre + half))


class Continued(NamedTuple):
    """What a model, edited or not, wrote after some prompts."""

    ids: Int64[Tensor, "n longer"]
    """Prompts and what came after."""
    texts: list[str]
    """What came after, up to the end of the story."""
    nats: Float[np.ndarray, " n"]
    """What it costs the UNTOUCHED model, mean nats a token: the damage done."""
    repeats: Float[np.ndarray, " n"]
    """Share of its tokens that already stood in it."""


def write(
    model: nn.Module,
    prompts: Int64[Tensor, "n prompt"],
    length: int,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    *,
    temperature: int | float = 0.8,
    seed: int = 0,
    batch_size: int = 128,
) -> Continued:
    """Continues the prompts by `length` tokens, and asks the untouched model about it.

    The same seed draws by the same random numbers whatever the edits.
    """
    tokenizer = model.tokenizer
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id} - {None}
    parts: list[tuple] = []
    for some in prompts.split(batch_size):
        ids = continued(
            model, some, length, temperature=temperature, seed=seed, edits=edits
        )
        logits = interventions.run(model, ids)[:, some.shape[1] - 1 : -1].float()
        new = ids[:, some.shape[1] :]
        nats = F.cross_entropy(logits.cpu().mT, new, reduction="none")
        over = torch.isin(new, torch.tensor(sorted(ends))).cumsum(1) > 0
        kept = ~over | (torch.arange(length) == 0)  # a story may end at once
        cost = (nats * kept).sum(1) / kept.sum(1)
        rows = [row[row_kept] for row, row_kept in zip(new, ~over, strict=True)]
        repeats = [1 - len(row.unique()) / max(len(row), 1) for row in rows]
        parts.append((ids, [tokenizer.decode(r) for r in rows], cost, repeats))
    ids, texts, cost, repeats = zip(*parts, strict=True)
    return Continued(
        torch.cat(ids),
        [text for part in texts for text in part],
        torch.cat(cost).numpy(),
        np.array([r for part in repeats for r in part]),
    )


def success(written: Continued, words: frozenset[str]) -> dict[str, float]:
    """Share of texts with a word of the concept, its interval, and mean damage.

    Returns n, hits, rate, low, high (Wilson, 95 %), nats, nats_error (1.96 standard
    errors), repeats.
    """
    found = contains(written.texts, words)
    hits, n = int(found.sum()), len(found)
    low, high = wilson(hits, n)
    error = 1.96 * written.nats.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return dict(
        n=n,
        hits=hits,
        rate=hits / n,
        low=low,
        high=high,
        nats=float(written.nats.mean()),
        nats_error=float(error),
        repeats=float(written.repeats.mean()),
    )


def compare(
    model: nn.Module,
    hook: str,
    arms: Mapping[str, Float[Tensor, "_ d_in"]],
    lengths: Mapping[str, Float[Tensor, " _"]],
    words: Mapping[str, frozenset[str]],
    prompts: Int64[Tensor, "n prompt"],
    length: int,
    *,
    shared: Sequence[str] = ("random",),
    seed: int = 0,
) -> "pd.DataFrame":
    """Success and damage of steering, a row a concept and arm; "none" leaves it be.

    Args:
        arms: name -> a direction a concept; lengths: how long it is added.
        shared: arms that have any number of directions, for all concepts alike: the
            prompts are dealt among them in turn. One random direction may well bring a
            concept; several are a null.
        words: concept -> its words; the concepts' order is that of the directions.
        length: tokens written after each prompt.

    Returns concept, arm and the columns of `success`.
    """
    import pandas as pd

    def told(directions: Tensor, sizes: Tensor) -> Continued:
        parts = []
        for i, direction in enumerate(directions):
            edits = {hook: interventions.push(direction, sizes[i].item())}
            some = prompts[i :: len(directions)]
            parts.append(write(model, some, length, edits, seed=seed + i))
        return _joined(parts)

    plain, rows = write(model, prompts, length, seed=seed), []
    common = {a: told(d, lengths[a]) for a, d in arms.items() if a in shared}
    for c, (concept, own) in enumerate(words.items()):
        texts = {"none": plain}
        for arm, directions in arms.items():
            one = slice(c, c + 1)
            texts[arm] = common.get(arm) or told(directions[one], lengths[arm][one])
        for arm, written in texts.items():
            rows.append({"concept": concept, "arm": arm} | success(written, own))
    return pd.DataFrame(rows)


def _joined(parts: Sequence[Continued]) -> Continued:
    ids, texts, nats, repeats = zip(*parts, strict=True)
    every = [text for some in texts for text in some]
    return Continued(
        torch.cat(ids), every, np.concatenate(nats), np.concatenate(repeats)
    )
