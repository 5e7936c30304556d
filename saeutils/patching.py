"""Two prompts that differ in one word: which units carry the difference?

Activations of one prompt take the place of the other's, whole or a few units at a time
(`interventions.patch` for latents, `replace` for neurons), and what the model then says
is held against what it says of either prompt.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from saeutils import interventions
from saeutils.splicing import edited
from saeutils.story_models import first_token

if TYPE_CHECKING:
    import pandas as pd

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


class BySize(NamedTuple):
    """How much sets of units carry, by their size (`by_size`)."""

    frame: "pd.DataFrame"
    """name ("best latents", "random latents", …), run, x (units patched), y (share)."""
    limits: dict[str, float]
    """What the whole activations carry, and all latents at once."""
    difference: float
    """Score of a − score of b: what there was to carry."""
    best: dict[str, list[int]]
    """Kind -> its units, best first."""
    n: int
    """Pairs tested on."""


def by_size(
    model: nn.Module,
    pairs: Pairs,
    score: Score,
    kinds: Mapping[str, tuple[str, Any]],
    sizes: Sequence[int],
    *,
    runs: int = 5,
    seed: int = 0,
) -> BySize:
    """Share of the difference that the best few units carry, and random sets of them.

    Units are ranked on the first half of the pairs (`by_effect`) and patched in the
    second; random sets are of those units that differ at all there, so that the null
    is not lost among silent ones.

    Args:
        kinds: name -> (hook, its SAE; None: the activations there, as neurons).

    Raises ValueError for fewer than two pairs, and for unknown hooks.
    """
    import pandas as pd

    half = len(pairs.a) // 2
    if half < 1:
        raise ValueError(f"{len(pairs.a)} pair: one to choose units on, one to test")
    learn, exam = (
        Pairs(*(part[s] for part in pairs)) for s in (slice(half), slice(half, None))
    )
    hooks = list(dict.fromkeys(hook for hook, _ in kinds.values()))
    source = interventions.recorded(model, exam.a, hooks)
    generator = torch.Generator().manual_seed(seed)
    parts, ends, best = [], {}, {}

    def patched(kind: str, units: list[int] | None) -> dict[str, interventions.Edit]:
        hook, sae = kinds[kind]
        if sae is None:
            return {hook: interventions.replace(source[hook], units)}
        return {hook: interventions.patch(sae, source[hook], units)}

    for kind, (hook, sae) in kinds.items():
        ends |= {f"whole {hook}": {hook: interventions.replace(source[hook])}}
        ends |= {f"all {kind}": patched(kind, None)} if sae is not None else {}
        best[kind], _ = by_effect(model, hook, learn, score, sae)
        _, differ = by_effect(model, hook, exam, score, sae)
        sets = {("best", 0): best[kind]}
        for run in range(runs):
            order = torch.randperm(len(differ), generator=generator)
            sets["random", run] = [differ[i] for i in order]
        for (which, run), units in sets.items():
            edits = [patched(kind, units[:n]) for n in sizes]
            shares = carried(model, exam, score, edits).share
            own = {"name": f"{which} {kind}", "run": run, "x": sizes, "y": shares}
            parts.append(pd.DataFrame(own))
    whole = carried(model, exam, score, list(ends.values()))
    frame = pd.concat(parts, ignore_index=True)
    limits = dict(zip(ends, whole.share, strict=True))
    return BySize(frame, limits, whole.difference, best, len(exam.a))
