"""Reading a latent to the end: contexts, tokens, positions, effect on logits."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from saeutils.context import token_texts
from saeutils.examples import at_quantiles
from saeutils.models import evaluation_mode, hook_point

if TYPE_CHECKING:
    import pandas as pd


class Snippet(NamedTuple):
    """A place where a latent fires, and what lies around it."""

    group: str
    """Which quantile of the latent's activations."""
    tokens: list[str]
    values: Float[np.ndarray, " tokens"]
    """Activation on each token; 0 where it is silent."""
    place: int
    """The token that was looked for."""


def snippets(
    codes: Any,
    latent: int,
    tokenizer: Any,
    *,
    quantiles: Sequence[int | float] = (1, 0.9, 0.5, 0.1),
    n: int = 3,
    before: int = 12,
    after: int = 8,
) -> list[Snippet]:
    """Contexts at several quantiles of a latent's activations (see `at_quantiles`).

    Args:
        codes: a `codes.CodeStore`, with the tokens of its rows.
        before, after: tokens shown around.
    """
    rows, values = (part.numpy() for part in codes.column(latent))
    found = []
    for level in at_quantiles(codes, latent, quantiles, n):
        name = "strongest" if level.quantile == 1 else f"quantile {level.quantile:g}"
        for row in level.rows.tolist():
            near = codes.context(row, before, after)
            own = np.zeros(len(near.tokens), np.float32)
            first = row - near.place
            a, b = np.searchsorted(rows, [first, first + len(own)])
            own[rows[a:b] - first] = values[a:b]
            texts = token_texts(tokenizer, near.tokens)
            found.append(Snippet(name, texts, own, near.place))
    return found


def by_token(codes: Any, latent: int, tokenizer: Any, n: int = 8) -> "pd.DataFrame":
    """The n tokens on which a latent fires most often, most often first.

    Columns: token (as text), rows (of that token), fires (on how many of them), share
    (fires / rows), mean (activation where it fires), of_firings (share of all its
    firings).
    """
    import pandas as pd

    rows, values = (part.numpy() for part in codes.column(latent))
    token = codes.provenance["token"].to_numpy()
    size, fires = np.bincount(token), np.bincount(token[rows])
    mass = np.bincount(token[rows], values)
    top = np.lexsort((np.arange(len(fires)), -fires))[:n]
    top = top[fires[top] > 0]
    columns = {"token": token_texts(tokenizer, top.tolist()), "rows": size[top]}
    columns |= {"fires": fires[top], "share": fires[top] / size[top]}
    columns |= {"mean": mass[top] / fires[top], "of_firings": fires[top] / len(rows)}
    return pd.DataFrame(columns)


def by_position(codes: Any, latent: int) -> tuple[Int[np.ndarray, " bins"], Any]:
    """Where each bin of positions starts (each twice the last), and the share of rows
    there on which the latent fires; bins without rows are left out."""
    rows = codes.column(latent).rows.numpy()
    position = codes.provenance["position"].to_numpy()
    # Position 0 is BOS, which makes no row: the first token stands at 1.
    level = np.floor(np.log2(np.maximum(position, 1))).astype(int)
    size = np.bincount(level)
    share = np.bincount(level[rows], minlength=len(size)) / np.maximum(size, 1)
    return (2 ** np.arange(len(size)))[size > 0], share[size > 0]


class LogitEffect(NamedTuple):
    """What a latent adds to each logit, less the mean over the vocabulary."""

    logits: Float[Tensor, " vocabulary"]
    """Mean over some rows on which the latent fires."""
    random: Float[Tensor, "draws vocabulary"]
    """The same of random directions of the same length, on the same rows."""
    n: int
    """Rows."""

    def strongest(self, k: int) -> tuple[Int64[Tensor, " k"], Int64[Tensor, " k"]]:
        """The k tokens that are promoted most, and suppressed most; strongest first."""
        return self.logits.topk(k).indices, (-self.logits).topk(k).indices

    @property
    def by_chance(self) -> tuple[float, float]:
        """Largest and smallest effect of a random direction, on average."""
        return self.random.amax(1).mean().item(), self.random.amin(1).mean().item()

    @property
    def beyond_chance(self) -> float:
        """The largest effect on any logit, in those of random directions (mean)."""
        return (self.logits.abs().max() / self.random.abs().amax(1).mean()).item()


@torch.no_grad()
def logit_effect(
    model: nn.Module,
    hook: str,
    sae: Any,
    codes: Any,
    latent: int,
    ids: Int64[np.ndarray, "n context"],
    documents: Int64[np.ndarray, " n"],
    *,
    rows: int = 64,
    draws: int = 16,
    seed: int = 0,
) -> LogitEffect:
    """The direct path from a latent through the final norm and the unembedding:

        mean over rows of  logits(x) − logits(x − z W_dec[latent]),
        logits(x) = unembed(ln_final(x)),  x the last residual stream, z the activation

    The final norm is the real one at each row, not folded or frozen. Layers between
    hook and unembedding do not see the change: in the last layer this is the whole
    effect, before that only its direct part.

    Args:
        codes: a `codes.CodeStore` of these stories, on whose strongest-to-weakest
            evenly spaced firings the mean is taken.
        ids, documents: tokens that the model was given, and the story of each.
        rows: firings at most; draws: random directions.

    Raises ValueError for a latent that never fires, or a hook whose activations are
    not added to the residual stream as they are.
    """
    hook_point(model, hook)
    if sae.W_dec.shape[1] != model.cfg.d_model:
        raise ValueError(
            f"the SAE's rows are {sae.W_dec.shape[1]} wide, the residual stream "
            f"{model.cfg.d_model}: there is no direct path from {hook!r} to the logits"
        )
    where, value = codes.column(latent)
    if not len(where):
        raise ValueError(f"latent {latent} never fires here: it has no effect")
    order = value.argsort(stable=True)
    picks = np.linspace(0, len(order) - 1, min(rows, len(order))).round().astype(int)
    chosen = order[picks]
    records = codes.provenance.iloc[where[chosen].numpy()]
    place = {story: i for i, story in enumerate(documents.tolist())}
    stories, which = np.unique(records["id"], return_inverse=True)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    device = next(model.parameters()).device
    residuals = []
    text = torch.from_numpy(ids[[place[i] for i in stories.tolist()]]).to(device)
    with evaluation_mode(model):
        for part in text.split(16):
            _, cache = model.run_with_cache(part, names_filter=[last])
            residuals.append(cache[last])
        position = torch.tensor(records["position"].to_list())
        x = torch.cat(residuals)[torch.from_numpy(which), position]
        z = value[chosen].to(x)[:, None]
        base = model.unembed(model.ln_final(x[:, None]))[:, 0].float()

        def effect(direction: Tensor) -> Tensor:
            without = model.unembed(model.ln_final((x - z * direction)[:, None]))[:, 0]
            mean = (base - without.float()).mean(0)
            return (mean - mean.mean()).cpu()

        own = sae.W_dec[latent].to(x)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(draws, len(own), generator=generator).to(x)
        noise *= own.norm() / noise.norm(dim=1, keepdim=True)
        return LogitEffect(
            effect(own), torch.stack([effect(one) for one in noise]), len(x)
        )


def profile(
    codes: Any, latent: int, tokenizer: Any, effect: LogitEffect, n: int = 6
) -> dict[str, Any]:
    """What `plots.latent_profiles` shows: n tokens promoted, and n suppressed."""
    up, down = effect.strongest(n)
    shown = torch.cat([up, down.flip(0)])
    return {
        "tokens": by_token(codes, latent, tokenizer),
        "positions": by_position(codes, latent),
        "logits": (token_texts(tokenizer, shown.tolist()), effect.logits[shown]),
        "by chance": effect.by_chance,
    }


def chosen_by_rank(
    scores: Float[np.ndarray, " n"],
    allowed: Bool[np.ndarray, " n"],
    ranks: Sequence[int | float] = (0.95, 0.5, 0.05),
) -> list[int]:
    """Whom to read, without picking: those at given ranks (0 worst, 1 best) by score.

    Of equal scores the earlier one ranks lower; NaN is never chosen. Raises ValueError
    when there are fewer candidates than ranks.
    """
    candidates = np.flatnonzero(allowed & np.isfinite(scores))
    if len(candidates) < len(ranks):
        raise ValueError(
            f"{len(candidates)} candidates for {len(ranks)} ranks: lower the demands"
        )
    order = candidates[np.argsort(scores[candidates], kind="stable")]
    return [int(order[round(rank * (len(order) - 1))]) for rank in ranks]
