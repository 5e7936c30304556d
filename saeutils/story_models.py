"""Story transformers as subjects: load one, measure it, let it speak.

A model is transformer_lens' TransformerBridge around the one of transformers, with its
tokenizer, from the embedded weights, a local folder in the hub's layout, or the hub.
Its hook points have transformer_lens' names (`model.hook_dict`), as
"blocks.0.hook_mlp_out" or "blocks.1.hook_resid_post".
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from saeutils.datasets import data_folder
from saeutils.models import evaluate, evaluation_mode, hook_point
from saeutils.splicing import edited
from saeutils.stories import Tokens
from saeutils.streaming import RunningMoments

if TYPE_CHECKING:
    import pandas as pd

EMBEDDED = ("story-1L", "story-2L")
ON_THE_HUB = {  # transformer_lens' names of what the notebooks use
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
    "tiny-stories-2L-33M": "roneneldan/TinyStories-2Layers-33M",
}
IGNORED = -100  # the label of a position where nothing is to be predicted


def story_model(name: str | Path = "story-2L", *, device: str = "cpu") -> nn.Module:
    """A TransformerBridge in eval mode, with `tokenizer`, `cfg` and `hook_dict`.

    Its logits are those of transformers with eager attention, to 1e-5.

    Args:
        name: "story-1L" or "story-2L", embedded in the repository; the path of a
            local folder in the hub's layout (config.json, model.safetensors,
            tokenizer.json); or a name on the hub, as "roneneldan/TinyStories-1M", or
            transformer_lens' "tiny-stories-1L-21M".

    Raises:
        ValueError: a folder that is no model or lacks its tokenizer, or a tokenizer
            with other tokens than the model's.
        FileNotFoundError, ConnectionError: a path or name that is not to be had.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    instead = f"the embedded ones need no network: {' or '.join(EMBEDDED)}"
    place = _place(name, instead)
    local = isinstance(place, Path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(place))
        model = TransformerBridge.boot_transformers(
            str(place), device=device, tokenizer=tokenizer
        )
    except (OSError, ValueError, RuntimeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if local:
            raise ValueError(f"{place} cannot be loaded as a model ({why})") from error
        raise ConnectionError(
            f"the model {place!r} cannot be had from the hub ({why}). Give the path of "
            f"a local folder in its layout, or take another model: {instead}"
        ) from error
    vocabulary = model.cfg.d_vocab
    if len(model.tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer of {place} has {len(model.tokenizer):,} tokens, the model "
            f"{vocabulary:,}: it belongs to another model"
        )
    return model.eval()


def _place(name: str | Path, instead: str) -> str | Path:
    """A folder that is there, or a name on the hub."""
    text = str(name)
    if text in EMBEDDED:
        return data_folder() / text
    path = Path(name).expanduser()
    if path.is_dir():
        needed = {"config.json": path / "config.json"}
        needed["tokenizer.json"] = path / "tokenizer.json"
        missing = [n for n, file in needed.items() if not file.is_file()]
        if missing:
            raise ValueError(
                f"{path} is not a model in the hub's layout: no {', '.join(missing)}. "
                "model.save_pretrained(folder) and tokenizer.save_pretrained(folder) "
                "make one"
            )
        return path.resolve()
    if isinstance(name, Path) or text.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no folder {name}; {instead}")
    return ON_THE_HUB.get(text, text)


def check_tokens(model: nn.Module, ids: Int64[Tensor, "n context"]) -> None:
    """Raises ValueError for token ids or a length that the model does not know."""
    vocabulary, context = model.cfg.d_vocab, model.cfg.n_ctx
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"token ids from {ids.min()} to {ids.max()}, but the model knows 0 to "
            f"{vocabulary - 1}: they were made by the tokenizer of another model"
        )
    if ids.shape[1] > context:
        raise ValueError(f"rows of {ids.shape[1]} tokens: the model sees {context}")


def next_tokens(
    model: nn.Module, tokens: Tokens
) -> tuple[Int64[Tensor, "n context"], Int64[Tensor, "n context"]]:
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


def loss_by_token(
    model: nn.Module,
    pair: tuple[Int64[Tensor, "n context"], Int64[Tensor, "n context"]],
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


def ablations(
    model: nn.Module,
    pair: tuple[Int64[Tensor, "n context"], Int64[Tensor, "n context"]],
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
    model: nn.Module, pair: tuple[Tensor, Tensor], hooks: Sequence[str]
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
    pair: tuple[Int64[Tensor, "n context"], Int64[Tensor, "n context"]],
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


def generate(
    model: nn.Module,
    prompt: str = "Once upon a time",
    *,
    n: int = 3,
    length: int = 100,
    temperature: int | float = 0.8,
    top: int = 40,
    seed: int = 0,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> list[str]:
    """n continuations of the prompt, each until the story ends or `length` tokens.

    Args:
        temperature: 0 takes the likeliest token; else one is drawn among the `top`
            likeliest, by `seed` alone.
        edits: hook -> what replaces its activations meanwhile.

    Raises ValueError when prompt and continuation exceed the context.
    """
    tokenizer = model.tokenizer
    start = [_first(tokenizer), *tokenizer.encode(prompt, add_special_tokens=False)]
    if len(start) + length > model.cfg.n_ctx:
        raise ValueError(
            f"a prompt of {len(start)} tokens and {length} more: the model sees "
            f"{model.cfg.n_ctx}"
        )
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor([start] * n)
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    with evaluation_mode(model), ExitStack() as stack:
        for hook, edit in (edits or {}).items():
            stack.enter_context(edited(model, hook, edit))
        for _ in range(length):
            logits = model(rows.to(device))[:, -1].float().cpu()
            values, place = logits.topk(1 if temperature == 0 else top)
            p = (values / (temperature or 1)).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)
            rows = torch.cat([rows, place.gather(1, drawn)], 1)
    return [_story(tokenizer, row[1:], ends) for row in rows.tolist()]


def _first(tokenizer: Any) -> int:
    """The token that begins a story."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def _story(tokenizer: Any, ids: list[int], ends: set[int]) -> str:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop]).strip()
