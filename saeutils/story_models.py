"""Story transformers as subjects: load one, measure it, let it speak.

A model is transformer_lens' TransformerBridge around the one of transformers, with its
tokenizer, from the embedded weights, a local folder in the hub's layout, or the hub.
Its hook points have transformer_lens' names (`model.hook_dict`), as
"blocks.0.hook_mlp_out" or "blocks.1.hook_resid_post".
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from saeutils.datasets import data_folder
from saeutils.models import evaluation_mode
from saeutils.splicing import edited

if TYPE_CHECKING:
    pass

EMBEDDED = ("story-1L", "story-2L")
ON_THE_HUB = {  # transformer_lens' names of what the notebooks use
    "tiny-stories-1M": "roneneldan/TinyStories-1M",
    "tiny-stories-1L-21M": "roneneldan/TinyStories-1Layer-21M",
    "tiny-stories-2L-33M": "roneneldan/TinyStories-2Layers-33M",
}


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


def generate(
    model: nn.Module,
    prompt: str | Sequence[str] = "Once upon a time",
    *,
    n: int = 3,
    length: int = 100,
    temperature: int | float = 0.8,
    top: int = 40,
    seed: int = 0,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> list[str]:
    """n continuations of each prompt, until the story ends or `length` tokens.

    Args:
        prompt: one, or several; the n stories of each follow those of the one before.
        temperature: 0 takes the likeliest token; else one is drawn among the `top`
            likeliest, by `seed` alone.
        edits: hook -> what replaces its activations meanwhile (see `interventions`).

    Raises ValueError when a prompt and its continuation exceed the context.
    """
    tokenizer = model.tokenizer
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    coded = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    starts = [[first_token(tokenizer), *ids] for ids in coded for _ in range(n)]
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id}
    told = dict.fromkeys(range(len(starts)), "")
    for size in sorted({len(ids) for ids in starts}):  # equal lengths need no padding
        some = [i for i, ids in enumerate(starts) if len(ids) == size]
        rows = continued(
            model,
            torch.tensor([starts[i] for i in some]),
            length,
            temperature=temperature,
            top=top,
            seed=seed,
            edits=edits,
        )
        for i, row in zip(some, rows[:, 1:].tolist(), strict=True):
            told[i] = _story(tokenizer, row, ends)
    return list(told.values())


def continued(
    model: nn.Module,
    ids: Int64[Tensor, "n prompt"],
    length: int,
    *,
    temperature: int | float = 0.8,
    top: int = 40,
    seed: int = 0,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> Int64[Tensor, "n longer"]:
    """The rows with `length` more tokens each, drawn as `generate` does.

    Keys and values are kept from token to token, unless an edit needs to see the whole
    text every time: any that does not call itself `pointwise`, as the edits of
    `interventions` do that treat all positions alike.

    Raises ValueError for tokens that the model does not know, or too long a row.
    """
    check_tokens(model, ids)
    if ids.shape[1] + length > model.cfg.n_ctx:
        raise ValueError(
            f"a prompt of {ids.shape[1]} tokens and {length} more: the model sees "
            f"{model.cfg.n_ctx}"
        )
    edits = edits or {}
    keep = all(getattr(edit, "pointwise", False) for edit in edits.values())
    generator, kept = torch.Generator().manual_seed(seed), None
    rows = ids.to(next(model.parameters()).device)
    with evaluation_mode(model), ExitStack() as stack:
        for hook, edit in edits.items():
            stack.enter_context(edited(model, hook, edit))
        for _ in range(length):
            seen = rows if kept is None else rows[:, -1:]
            # The wrapped model runs the same modules, hooks and all.
            out = model.original_model(seen, past_key_values=kept, use_cache=keep)
            kept = out.past_key_values if keep else None
            logits = out.logits[:, -1].float().cpu()
            values, place = logits.topk(1 if temperature == 0 else top)
            p = (values / (temperature or 1)).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=generator)
            rows = torch.cat([rows, place.gather(1, drawn).to(rows)], 1)
    return rows.cpu()


def first_token(tokenizer: Any) -> int:
    """The token that begins a story."""
    bos = tokenizer.bos_token_id
    return tokenizer.eos_token_id if bos is None else bos


def _story(tokenizer: Any, ids: list[int], ends: set[int]) -> str:
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return tokenizer.decode(ids[:stop]).strip()


def word_token(tokenizer: Any, word: str) -> int:
    """The token of a word in the middle of a sentence.

    Raises ValueError for a word of several tokens.
    """
    alone = tokenizer.encode("x", add_special_tokens=False)
    both = tokenizer.encode(f"x {word}", add_special_tokens=False)
    if both[:-1] != alone:
        raise ValueError(f"{word!r} is not a single token of this tokenizer")
    return both[-1]
