"""What a language model says of text: losses, what its parts are worth, where it looks.

Everything takes a TransformerBridge (see `story_models`) and the pair (inputs, labels)
that `next_tokens` makes, which `models.evaluate`, `splicing.in_model` and
`metrics.scorecard` take, too.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from saeutils.models import evaluate, evaluation_mode, hook_point
from saeutils.splicing import edited
from saeutils.stories import Tokens
from saeutils.story_models import check_tokens, word_token
from saeutils.streaming import RunningMoments

if TYPE_CHECKING:
    import pandas as pd

IGNORED = -100  # the label of a position where nothing is to be predicted
Pair = tuple[Int64[Tensor, "n context"], Int64[Tensor, "n context"]]


def next_tokens(model: nn.Module, tokens: Tokens) -> Pair:
    """The pair (inputs, labels) that `evaluate`, `in_model` and `scorecard` take.

    The label of a position is the next token; IGNORED at the end of a row and in the
    padding, but for the first token after a story, which ends it.

    Raises ValueError for tokens that the model does not know.
    """
    ids = torch.from_numpy(tokens.ids)
    check_tokens(model, ids)
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    for row, spans in enumerate(tokens.spans):
        length = sum(stop > start for start, stop in spans)
        labels[row, length + 1 :] = IGNORED
    return ids, labels


def story_positions(tokens: Tokens) -> Bool[Tensor, "n context"]:
    """Where a token of a story stands: not BOS, not padding.

    The positions that `save_activations` makes rows of, and so those at which an SAE
    belongs: `where` of `splicing.in_model` and `metrics.scorecard`.
    """
    ids = torch.from_numpy(tokens.ids)
    if not tokens.spans:  # packed: no padding, and the first row begins with BOS
        return ids != ids[0, 0]
    lengths = [sum(b > a for a, b in spans) for spans in tokens.spans]
    place = torch.arange(ids.shape[1])
    return (place >= 1) & (place <= torch.tensor(lengths)[:, None])


def loss_by_token(
    model: nn.Module,
    pair: Pair,
    *,
    batch_size: int = 32,
) -> Float[Tensor, "n context"]:
    """−log p(label), in nats; NaN where nothing is to be predicted."""
    ids, labels = pair
    device = next(model.parameters()).device
    parts = []
    with evaluation_mode(model):
        for i in range(0, len(ids), batch_size):
            logits = model(ids[i : i + batch_size].to(device)).float()
            wanted = labels[i : i + batch_size].to(device)
            nats = F.cross_entropy(logits.mT, wanted, reduction="none")
            parts.append(nats.masked_fill(wanted == IGNORED, torch.nan).cpu())
    return torch.cat(parts)


def by_position(
    nats: Float[Tensor, "n context"],
) -> tuple[Int64[Tensor, " bins"], Float[Tensor, " bins"]]:
    """Where each bin of positions starts, and its mean loss; bins widen by √2.

    Positions count from 1: the first token after BOS. Bins without a loss are left out.
    """
    steps = 2.0 ** torch.arange(0, math.log2(nats.shape[1]) + 0.75, 0.5)
    edges = steps.long().unique()
    means = torch.stack(
        [nats[:, a - 1 : b - 1].nanmean() for a, b in pairwise(edges.tolist())]
    )
    return edges[:-1][~means.isnan()], means[~means.isnan()]


def ablations(
    model: nn.Module,
    pair: Pair,
    hooks: Sequence[str],
) -> "pd.DataFrame":
    """What each hook point is worth: the loss without it, and the difference.

    Zero-ablation puts zeros in the place of the activations, and often costs more than
    they carry, because the rest was never trained on zeros. Mean-ablation puts their
    mean over all positions, and so removes only what varies.

    Returns one row a hook: hook, clean, zero, mean (nats a token), Δ zero, Δ mean,
    uniform (log of the vocabulary: what knowing nothing costs).
    """
    import pandas as pd

    means = _means(model, pair, hooks)
    clean = evaluate(model, pair).cross_entropy
    rows = []
    for hook in hooks:
        edits = {"zero": torch.zeros_like, "mean": _constant(means[hook])}
        row = {"hook": hook, "clean": clean}
        for name, edit in edits.items():
            with edited(model, hook, edit):
                row[name] = evaluate(model, pair).cross_entropy
        rows.append(row)
    table = pd.DataFrame(rows)
    for name in ("zero", "mean"):
        table[f"Δ {name}"] = table[name] - table.clean
    return table.assign(uniform=float(np.log(model.cfg.d_vocab)))


def _constant(mean: Float[Tensor, " d"]) -> Callable[[Tensor], Tensor]:
    return lambda acts: mean.to(acts).expand_as(acts)


def _means(
    model: nn.Module, pair: Pair, hooks: Sequence[str]
) -> dict[str, Float[Tensor, " d"]]:
    moments: dict[str, RunningMoments] = {}

    def watch(hook: str) -> Callable[[Tensor], Tensor]:
        def add(acts: Tensor) -> Tensor:
            rows = acts.flatten(0, -2)
            if hook not in moments:
                moments[hook] = RunningMoments(rows.shape[1], device=rows.device)
            moments[hook].update(rows)
            return acts

        return add

    with ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(edited(model, hook, watch(hook)))
        evaluate(model, pair)
    return {hook: m.mean for hook, m in moments.items()}


class Attention(NamedTuple):
    """How one layer attends, averaged over rows (and positions)."""

    hook: str
    pattern: Float[Tensor, "heads query key"]
    """Mean share of attention that a position gives to another."""
    distance: Float[Tensor, " heads"]
    """Mean number of positions looked back."""
    first: Float[Tensor, " heads"]
    """Share that goes to the first position, of all but that."""
    reach: int
    """How far back any attention goes; shows the window of a local layer."""


def attention(
    model: nn.Module, ids: Int64[Tensor, "n context"], layers: Sequence[int]
) -> list[Attention]:
    """Where the heads of each layer look. Raises ValueError for an unknown layer."""
    check_tokens(model, ids)
    hooks = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    for hook in hooks:
        hook_point(model, hook)
    found = []
    place = torch.arange(ids.shape[1])
    back = (place[:, None] - place).float()
    with evaluation_mode(model):
        _, cache = model.run_with_cache(
            ids.to(next(model.parameters()).device), names_filter=hooks
        )
    for hook in hooks:
        pattern = cache[hook].float().cpu().mean(0)
        seen = (pattern > 0).any(0)
        found.append(
            Attention(
                hook,
                pattern,
                (pattern * back).sum(-1).mean(-1),
                pattern[:, 1:, 0].mean(-1),
                int(back[seen].max()),
            )
        )
    return found


def logit_lens(
    model: nn.Module,
    pair: Pair,
    *,
    batch_size: int = 32,
) -> "pd.Series":
    """Loss (nats a token) if the model had to speak after each step of its layers.

        softmax(W_U · ln_final(x)),  x the residual stream at that place

    The last one is the loss of the model itself. Source: nostalgebraist, "interpreting
    GPT: the logit lens", 2020.
    """
    import pandas as pd

    n = model.cfg.n_layers
    names = {"embedding": "blocks.0.hook_resid_pre"}
    for i in range(n):
        names[f"attention {i}"] = f"blocks.{i}.hook_resid_mid"
        names[f"MLP {i}"] = f"blocks.{i}.hook_resid_post"
    names = {k: hook for k, hook in names.items() if hook in model.hook_dict}
    ids, labels = pair
    device = next(model.parameters()).device
    total, count = dict.fromkeys(names, 0.0), int((labels != IGNORED).sum())
    with evaluation_mode(model):
        for i in range(0, len(ids), batch_size):
            _, cache = model.run_with_cache(
                ids[i : i + batch_size].to(device), names_filter=list(names.values())
            )
            wanted = labels[i : i + batch_size].to(device)
            for name, hook in names.items():
                logits = model.unembed(model.ln_final(cache[hook])).float()
                nats = F.cross_entropy(logits.mT, wanted, reduction="sum")
                total[name] += nats.item()
    return pd.Series({name: nats / count for name, nats in total.items()})


class Choice(NamedTuple):
    """How often a model prefers the word that came to the other one."""

    words: tuple[str, str]
    right: float
    """Share of places where the word that stands there is the likelier of the two."""
    majority: float
    """What always naming the commoner one would reach."""
    n: int
    """Places."""


def forced_choices(
    model: nn.Module,
    pair: Pair,
    choices: Sequence[tuple[str, str]],
    *,
    batch_size: int = 32,
) -> list[Choice]:
    """Wherever one of two words comes next: does the model prefer it to the other?

    Args:
        choices: pairs of words, each a single token after a blank, as ("was", "were").

    Raises ValueError for a word of several tokens, and where neither occurs.
    """
    ids, labels = pair
    coded = [[word_token(model.tokenizer, word) for word in words] for words in choices]
    device = next(model.parameters()).device
    counts = torch.zeros(len(choices), 3, dtype=torch.int64)  # right, first word, all
    with evaluation_mode(model):
        for i in range(0, len(ids), batch_size):
            wanted = labels[i : i + batch_size].to(device)
            logits = model(ids[i : i + batch_size].to(device))
            for count, (a, b) in zip(counts, coded, strict=True):
                places = (wanted == a) | (wanted == b)
                is_a, values = wanted[places] == a, logits[places]
                right = (values[:, a] > values[:, b]) == is_a
                count += torch.tensor([right.sum(), is_a.sum(), len(is_a)])
    found = []
    for words, (right, first, n) in zip(choices, counts.tolist(), strict=True):
        if n == 0:
            raise ValueError(
                f"neither {words[0]!r} nor {words[1]!r} occurs in the text"
            )
        found.append(Choice(words, right / n, max(first, n - first) / n, n))
    return found


class Bigram:
    """p(b | a) = (max(c(a, b) − d, 0) + d · k(a) · q(b)) / c(a), fitted to rows of ids.

    c counts pairs, k(a) is how many kinds of token follow a, and q(b) is proportional
    to how many kinds precede b. The null for what context beyond one token is worth.
    Source: Kneser and Ney, 1995.
    """

    def __init__(self, pair: Pair, vocabulary: int, discount: float = 0.75) -> None:
        a, b = _asked(pair)
        keys, counts = (a * vocabulary + b).unique(return_counts=True)
        self.keys, self.vocabulary, self.discount = keys, vocabulary, discount
        self.counts = counts.double()
        self.total = a.bincount(minlength=vocabulary).double()
        self.kinds = (keys // vocabulary).bincount(minlength=vocabulary).double()
        before = (keys % vocabulary).bincount(minlength=vocabulary).double() + 0.5
        self.below = before / before.sum()

    def loss(self, pair: Pair) -> float:
        """Mean −log p(label), nats a token."""
        a, b = _asked(pair)
        key = a * self.vocabulary + b
        place = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
        count = torch.where(self.keys[place] == key, self.counts[place], 0.0)
        total = self.total[a]
        known = total > 0
        left = torch.where(known, self.discount * self.kinds[a], 1.0)
        p = (count - self.discount).clamp(min=0) + left * self.below[b]
        return -(p / total.clamp(min=1)).log().mean().item()


def _asked(pair: Pair) -> tuple[Int64[Tensor, " asked"], Int64[Tensor, " asked"]]:
    ids, labels = pair
    asked = labels != IGNORED
    return ids[asked], labels[asked]
