"""Two prompts that differ in one word: which units carry the difference?

Activations of one prompt take the place of the other's, whole or a few units at a time
(`interventions.patch` for latents, `replace` for neurons), and what the model then says
is held against what it says of either prompt.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from saeutils import interventions
from saeutils.splicing import edited
from saeutils.story_models import first_token

Score = Callable[[Float[Tensor, "n vocabulary"]], Float[Tensor, " n"]]


class Pairs(NamedTuple):
    """Prompts that differ in one word, token for token."""

    a: Int64[Tensor, "n positions"]
    b: Int64[Tensor, "n positions"]
    words: list[tuple[str, str]]


def matched_prompts(
    tokenizer: Any, template: str, first: Sequence[str], second: Sequence[str]
) -> Pairs:
    """The template with a word of `first` in the place of {}, and with one of `second`.

    Words are paired in order, among those whose prompts have as many tokens as most.
    Raises ValueError for a template without {}, and when no pair is left.
    """
    if "{}" not in template:
        raise ValueError(f"the template {template!r} has no {{}} for the word")

    def coded(word: str) -> list[int]:
        text = template.replace("{}", word)
        return [
            first_token(tokenizer),
            *tokenizer.encode(text, add_special_tokens=False),
        ]

    sides = [{word: coded(word) for word in words} for words in (first, second)]
    sizes = [Counter(map(len, side.values())) for side in sides]
    size = max(sizes[0], key=lambda s: min(sizes[0][s], sizes[1][s]), default=0)
    a, b = ([(w, i) for w, i in side.items() if len(i) == size] for side in sides)
    n = min(len(a), len(b))
    if n == 0:
        raise ValueError("no two of these words give prompts of as many tokens")
    ids = (torch.tensor([i for _, i in side[:n]]) for side in (a, b))
    return Pairs(*ids, [(x, y) for (x, _), (y, _) in zip(a, b, strict=False)])


def gradient(
    model: nn.Module, hook: str, ids: Int64[Tensor, "n positions"], score: Score
) -> tuple[Float[Tensor, "n positions d"], Float[Tensor, "n positions d"]]:
    """(activations at the hook, gradient of Σ score(last logits) with respect to them).

    Raises ValueError for a hook point that the model has not, or does not use.
    """
    seen: list[Tensor] = []

    def leaf(acts: Tensor) -> Tensor:
        seen.append(acts.detach().requires_grad_())
        return seen[-1]

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad(), edited(model, hook, leaf):
            logits = model(ids.to(next(model.parameters()).device))
            if not seen:
                raise ValueError(f"the model never calls {hook!r}")
            (slope,) = torch.autograd.grad(score(logits[:, -1].float()).sum(), seen)
    finally:
        for module, training in modes.items():
            module.training = training
    return seen[0].detach(), slope


def by_effect(
    model: nn.Module, hook: str, pairs: Pairs, score: Score, sae: Any = None
) -> tuple[list[int], list[int]]:
    """Units that patching a into b should change the score most by, largest first.

    To first order the effect of unit j is Σ (z_a − z_b)_j · ∂score/∂z_j, over
    positions and pairs: attribution patching (Nanda, 2023). Units are the SAE's
    latents, or without one the activations at the hook (neurons).

    Returns (all units by effect in the direction of a, those that differ at all).
    """
    source = interventions.recorded(model, pairs.a, [hook])[hook].flatten(0, -2)
    acts, slope = (t.flatten(0, -2) for t in gradient(model, hook, pairs.b, score))
    towards = score(interventions.run(model, pairs.a)[:, -1].float()).mean()
    away = score(interventions.run(model, pairs.b)[:, -1].float()).mean()
    if sae is None:
        change, effect = source - acts, ((source - acts) * slope).sum(0)
    else:
        with torch.no_grad():
            change = sae.encode(source.to(sae.W_dec)) - sae.encode(acts.to(sae.W_dec))
            effect = (change * (slope.to(sae.W_dec) @ sae.W_dec.T)).sum(0)
    order = (effect * (towards - away).sign()).argsort(descending=True)
    differ = change.abs().amax(0) > 0
    return order.tolist(), differ.nonzero().flatten().tolist()


class Carried(NamedTuple):
    """Mean score of b with parts of it taken from a."""

    share: list[float]
    """(patched − b) / (a − b) for each patch: 0 = as without, 1 = as in a."""
    difference: float
    """a − b: what there was to carry."""


def carried(
    model: nn.Module,
    pairs: Pairs,
    score: Score,
    patches: Sequence[Mapping[str, Callable[[Tensor], Tensor]]],
) -> Carried:
    """How much of the difference in score each patch of b carries over from a.

    Raises ValueError when a and b score alike: there is nothing to carry.
    """

    def mean(ids: Tensor, edits: Any = None) -> float:
        return score(interventions.run(model, ids, edits)[:, -1].float()).mean().item()

    a, b = mean(pairs.a), mean(pairs.b)
    if abs(a - b) < 1e-6:
        raise ValueError(f"a and b both score {a:.3g}: there is nothing to carry")
    return Carried([(mean(pairs.b, p) - b) / (a - b) for p in patches], a - b)
