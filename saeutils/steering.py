"""What an edit does to a language model: how far it moves, what it wins and costs.

Lengths that move the model equally far, the share of texts in which a concept's words
appear, and what the text costs the untouched model. `arms` makes the directions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from saeutils import interventions
from saeutils.arms import contains
from saeutils.story_models import continued, first_token

if TYPE_CHECKING:
    import pandas as pd

Arms = Mapping[str, Float[Tensor, "_ d_in"]]  # name -> directions, one a row
Edits = Mapping[str, Callable[[Tensor], Tensor]]
Versions = Mapping[str, Edits]


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
    arms: Arms,
    lengths: Sequence[int | float] | Float[np.ndarray, " lengths"],
    ids: Int64[Tensor, "n positions"],
    *,
    batch_size: int = 32,
) -> "pd.DataFrame":
    """KL (nats a token) when a direction is added at every position, by its length.

    Returns name (the arm), direction (its row there), x (the length), y (mean KL).
    """
    import pandas as pd

    keys = [(arm, i) for arm, rows in arms.items() for i in range(len(rows))]
    total = np.zeros((len(keys), len(lengths)))
    for batch in ids.split(batch_size):
        clean = interventions.run(model, batch)
        for number, (arm, i) in enumerate(keys):
            for j, length in enumerate(lengths):
                edit = {hook: interventions.push(arms[arm][i], float(length))}
                moved = divergence(clean, interventions.run(model, batch, edit))
                total[number, j] += moved.double().sum().item()
    parts = [
        pd.DataFrame({"name": arm, "direction": i, "x": lengths, "y": line})
        for (arm, i), line in zip(keys, total / ids.numel(), strict=True)
    ]
    return pd.concat(parts, ignore_index=True)


def lengths_for(
    model: nn.Module,
    hook: str,
    arms: Arms,
    ids: Int64[Tensor, "n positions"],
    kl: int | float,
    *,
    start: int | float = 1.0,
    tolerance: float = 0.03,
) -> dict[str, Float[Tensor, " _"]]:
    """How long each direction must be to move the model by `kl` nats a token.

    The mean KL (see `kl_by_length`) is then within `tolerance` of kl, as a share. For
    small lengths KL grows with their square, which is where the search begins; it ends
    in bisection. The clean predictions on ids are held: keep ids few.

    Raises ValueError when a direction does not get there at 2,000 times `start`.
    """
    if not kl > 0:
        raise ValueError(f"kl must be positive, got {kl}")
    clean = interventions.run(model, ids)

    def length_of(direction: Tensor, name: str) -> float:
        low, high, length = 0.0, float("inf"), float(start)
        for step in range(60):
            edit = {hook: interventions.push(direction, length)}
            here = divergence(clean, interventions.run(model, ids, edit)).mean().item()
            if abs(here / kl - 1) < tolerance:
                return length
            low, high = (length, high) if here < kl else (low, length)
            guess = length * min(max((kl / max(here, 1e-12)) ** 0.5, 0.1), 4.0)
            if step % 2 and low > 0 and high < float("inf"):
                guess = (low + high) / 2  # a KL that is no square makes the rest cycle
            elif not low < guess < high:
                guess = (low + high) / 2 if high < float("inf") else 2 * low
            length = guess
            if length > 2_000 * start:
                break
        raise ValueError(
            f"{name} moves the model by {here:.3g} nats at length {low:.3g}, and by "
            f"{kl} at none: the model hardly heeds that direction at {hook}"
        )

    return {
        arm: torch.tensor(
            [length_of(row, f"direction {i} of {arm!r}") for i, row in enumerate(rows)]
        )
        for arm, rows in arms.items()
    }


class NextToken(NamedTuple):
    """The likeliest next tokens after a prompt, under several edits."""

    tokens: list[str]
    """Those likeliest under any of them, by falling probability under the second."""
    probabilities: dict[str, Float[Tensor, " tokens"]]


def next_token(
    model: nn.Module, prompt: str, versions: Versions, *, top: int = 9
) -> NextToken:
    """What each version of the model says next: the `top` tokens of the first two.

    Args:
        versions: name -> its edits, the first the untouched model.
    """
    ids = _coded(model.tokenizer, prompt)
    p = {
        name: interventions.run(model, ids, edits)[0, -1].float().softmax(-1).cpu()
        for name, edits in versions.items()
    }
    first, second = list(p.values())[:2]
    shown = torch.cat([v.topk(top).indices for v in (first, second)]).unique()
    shown = shown[second[shown].argsort(descending=True)]
    texts = [model.tokenizer.decode([token]) for token in shown.tolist()]
    return NextToken(texts, {name: v[shown] for name, v in p.items()})


def told(
    model: nn.Module, prompt: str, versions: Versions, length: int, *, seed: int = 0
) -> dict[str, tuple[list[str], Float[Tensor, " tokens"]]]:
    """The prompt continued by each version, with what the edit did to each token.

    Returns name -> (tokens as text, log p with the edits − log p without, nats).
    """
    out = {}
    for name, edits in versions.items():
        start = _coded(model.tokenizer, prompt)
        ids = continued(model, start, length, seed=seed, edits=edits)
        texts = [model.tokenizer.decode([token]) for token in ids[0, 1:].tolist()]
        out[name] = texts, gains(model, ids, edits)[0, 1:]
    return out


def gains(
    model: nn.Module, ids: Int64[Tensor, "n positions"], edits: Edits
) -> Float[Tensor, "n positions"]:
    """log p with the edits − log p without, of each token (nats); NaN for the first."""
    logs = []
    for some in (edits, {}):
        logits = interventions.run(model, ids, some)[:, :-1].float().cpu()
        logs.append(-F.cross_entropy(logits.mT, ids[:, 1:], reduction="none"))
    return F.pad(logs[0] - logs[1], (1, 0), value=float("nan"))


def _coded(tokenizer: Any, text: str) -> Int64[Tensor, "1 tokens"]:
    ids = tokenizer.encode(text, add_special_tokens=False)
    return torch.tensor([[first_token(tokenizer), *ids]])


class Moved(NamedTuple):
    """Activations and codes at the hook, under one version of the model."""

    acts: Float[Tensor, "rows d_in"]
    mean: Float[Tensor, " d_sae"]
    """Mean code of each latent."""
    kept: float
    """Share of what fires in the first version that still fires in this one."""


def moved(
    model: nn.Module,
    hook: str,
    sae: Any,
    ids: Int64[Tensor, "n positions"],
    versions: Versions,
) -> dict[str, Moved]:
    """What each version does to all latents, over all positions but the first."""
    out, first = {}, None
    for name, edits in versions.items():
        acts = interventions.recorded(model, ids, [hook], edits)[hook]
        acts = acts[:, 1:].flatten(0, 1)
        with torch.no_grad():
            z = sae.encode(acts.to(sae.W_dec))
        first = z > 0 if first is None else first
        kept = ((z > 0) & first).sum() / first.sum().clamp(min=1)
        out[name] = Moved(acts.cpu(), z.mean(0).cpu(), kept.item())
    return out


def one_map(
    groups: Mapping[str, Float[Tensor, "_ d"]], *, seed: int = 0
) -> dict[str, Float[np.ndarray, "_ 2"]]:
    """UMAP of all groups together, by cosine. The number of threads stays what it is.

    Source: McInnes, Healy and Melville, 2018.
    """
    from threadpoolctl import threadpool_limits
    from umap import UMAP

    rows = torch.cat(list(groups.values())).numpy()
    how = dict(metric="cosine", random_state=seed, n_jobs=1)
    with threadpool_limits(user_api="openmp"):  # numba's threads are torch's, too
        points = UMAP(n_neighbors=min(15, len(rows) - 1), **how).fit_transform(rows)
    ends = np.cumsum([len(group) for group in groups.values()])[:-1]
    return dict(zip(groups, np.split(points, ends), strict=True))


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
    low, high = max(0, centre - half), min(1, centre + half)
    return float(min(low, share)), float(max(high, share))


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
    edits: Edits | None = None,
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


def success(written: Continued, words: frozenset[str]) -> dict[str, int | float]:
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
    arms: Arms,
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

    def steered(directions: Tensor, sizes: Tensor) -> Continued:
        parts = []
        for i, direction in enumerate(directions):
            edits = {hook: interventions.push(direction, sizes[i].item())}
            some = prompts[i :: len(directions)]
            parts.append(write(model, some, length, edits, seed=seed + i))
        return _joined(parts)

    plain, rows = write(model, prompts, length, seed=seed), []
    common = {a: steered(d, lengths[a]) for a, d in arms.items() if a in shared}
    for c, (concept, own) in enumerate(words.items()):
        texts = {"none": plain}
        for arm, directions in arms.items():
            one = slice(c, c + 1)
            texts[arm] = common.get(arm) or steered(directions[one], lengths[arm][one])
        for arm, written in texts.items():
            rows.append({"concept": concept, "arm": arm} | success(written, own))
    return pd.DataFrame(rows)


def _joined(parts: Sequence[Continued]) -> Continued:
    ids, texts, nats, repeats = zip(*parts, strict=True)
    every = [text for some in texts for text in some]
    return Continued(
        torch.cat(ids), every, np.concatenate(nats), np.concatenate(repeats)
    )


def apart(rates: "pd.DataFrame", more: str, less: str) -> list[str]:
    """Concepts for which the interval of one arm lies above that of another.

    Stricter than a test at the same level: intervals that touch may differ, too.
    """
    wide = rates.set_index(["arm", "concept"])
    above = wide.loc[more, "low"] > wide.loc[less, "high"]
    return above.index[above].tolist()
