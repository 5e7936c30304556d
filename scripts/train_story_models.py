"""Train the embedded story models: a tokenizer, and GPT-Neos of one and two layers.

    python scripts/train_story_models.py TEXT... --held-out data/stories/held-out.txt.xz

TEXT are files of stories (see `stories.read_stories`), such as sample_stories.py
writes; a quarter as much text again comes from the grammar. Writes data/story-1L and
data/story-2L in the hub's layout, each with a card. One CPU thread takes about half
an hour a model; a GPU is used where there is one.

Resumable: the state is written to --work every 100 steps, and the same command goes
on from there, on more text if more is given. A larger --steps trains further.

Hidden matrices are trained by Muon, the rest by AdamW, both on one cosine. The forward
pass is written out below, twice as fast as the eager one of transformers, which the
result is compared with.
"""

import argparse
import hashlib
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeutils import grammar
from saeutils.language import Bigram
from saeutils.stories import END, read_stories

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY, CONTEXT, WINDOW, WIDTH, HEADS = 4096, 256, 64, 192, 6
LAYERS = {"1L": ["global"], "2L": ["global", "local"]}
BATCH = 16  # rows of CONTEXT tokens
GRAMMAR_SHARE = 0.2  # of the tokens trained on
LR_MUON, LR_ADAM, WARM_UP = 0.02, 3e-3, 0.03
EVERY = 100  # steps between saved states
HELD_OUT_GRAMMAR = 10**9  # test stories of the grammar start here


# --- text -------------------------------------------------------------------


def make_tokenizer(texts: list[str], folder: Path):
    """Byte-level BPE as in GPT-2; one special token ends, begins and pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **dict.fromkeys(("bos_token", "eos_token", "unk_token", "pad_token"), END),
            model_max_length=CONTEXT,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(str(folder))
    return PreTrainedTokenizerFast.from_pretrained(str(folder))


def encode(tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Token ids of each story, begun by the special token."""
    coded = tokenizer.backend_tokenizer.encode_batch_fast(
        texts, add_special_tokens=False
    )
    bos = tokenizer.bos_token_id
    return [np.array([bos, *story.ids], np.int64) for story in coded]


def rows_of_epoch(stories: list[np.ndarray], epoch: int) -> np.ndarray:
    """All stories in an order of the epoch's own, cut into rows of CONTEXT + 1."""
    order = np.random.default_rng(epoch).permutation(len(stories))
    stream = np.concatenate([stories[i] for i in order])
    n = (len(stream) - 1) // CONTEXT
    places = np.arange(n)[:, None] * CONTEXT + np.arange(CONTEXT + 1)
    return stream[places]


# --- model ------------------------------------------------------------------


def new_model(name: str):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    kinds = LAYERS[name]
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        hidden_size=WIDTH,
        num_layers=len(kinds),
        num_heads=HEADS,
        attention_types=[[[kind], 1] for kind in kinds],
        window_size=WINDOW,
        intermediate_size=4 * WIDTH,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    return GPTNeoForCausalLM(config)


def forward(model, tokens: Tensor) -> Tensor:
    """Logits; GPT-Neo does not scale its scores, and its local layers see a window."""
    body, (n, length) = model.transformer, tokens.shape
    x = body.wte(tokens) + body.wpe.weight[:length]
    place = torch.arange(length, device=tokens.device)
    back = place[:, None] - place
    for block, kind in zip(body.h, model.config.attention_layers, strict=True):
        attention = block.attn.attention
        h = block.ln_1(x)
        q, k, v = (
            project(h).view(n, length, HEADS, -1).transpose(1, 2)
            for project in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        seen = {"is_causal": True}
        if kind == "local":
            seen = {"attn_mask": (back >= 0) & (back < WINDOW)}
        mixed = F.scaled_dot_product_attention(q, k, v, scale=1.0, **seen)
        x = x + attention.out_proj(mixed.transpose(1, 2).flatten(2))
        h = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
        x = x + block.mlp.c_proj(h)
    return F.linear(body.ln_f(x), body.wte.weight)


class Training:
    """A model, its two optimisers, and how far they are."""

    def __init__(self, name: str, work: Path, device: str, steps: int):
        self.model, self.device, self.steps = new_model(name).to(device), device, steps
        self.named = dict(self.model.named_parameters())
        hidden = {n for n, p in self.named.items() if ".h." in n and p.ndim == 2}
        rest = [p for n, p in self.named.items() if n not in hidden]
        self.muon = torch.optim.Muon(
            [self.named[n] for n in sorted(hidden)], lr=LR_MUON, weight_decay=0.0
        )
        self.adam = torch.optim.AdamW(
            rest, lr=LR_ADAM, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.path, self.step, self.seen = work / f"{name}.safetensors", 0, 0
        if self.path.exists():
            self._load()

    def update(self, tokens: np.ndarray) -> float:
        done = self.step / self.steps
        rise = min(1.0, (self.step + 1) / (WARM_UP * self.steps))
        scale = rise * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
        for optimiser, lr in ((self.muon, LR_MUON), (self.adam, LR_ADAM)):
            optimiser.param_groups[0]["lr"] = lr * scale
        rows = torch.from_numpy(tokens).to(self.device)
        loss = F.cross_entropy(
            forward(self.model, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
        )
        self.muon.zero_grad()
        self.adam.zero_grad()
        loss.backward()
        self.muon.step()
        self.adam.step()
        self.step += 1
        self.seen += rows[:, 1:].numel()
        return loss.item()

    def save(self) -> None:
        tensors = {"progress": torch.tensor([self.step, self.seen, self.steps])}
        for name, parameter in self.named.items():
            tensors[f"weight/{name}"] = parameter.detach()
            for optimiser in (self.muon, self.adam):
                for key, value in optimiser.state.get(parameter, {}).items():
                    tensors[f"{key}/{name}"] = value
        partial = self.path.with_suffix(".partial")
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, partial)
        os.replace(partial, self.path)

    def _load(self) -> None:
        saved = load_file(self.path, device=self.device)
        self.step, self.seen, _ = saved.pop("progress").tolist()
        for key, tensor in saved.items():
            kind, name = key.split("/")
            parameter = self.named[name]
            if kind == "weight":
                parameter.data.copy_(tensor)
                continue
            owner = self.muon if kind == "momentum_buffer" else self.adam
            owner.state[parameter][kind] = tensor


def train(
    name: str, stories: list[np.ndarray], work: Path, device: str, steps: int
) -> Training:
    run = Training(name, work, device, steps)
    began, first, losses = time.perf_counter(), run.seen, []
    a_pass, loaded = (sum(map(len, stories)) - 1) // CONTEXT, -1
    while run.step < steps:
        epoch, at = divmod(run.step * BATCH, a_pass)
        if epoch != loaded:
            rows, loaded = rows_of_epoch(stories, epoch), epoch
        losses.append(run.update(rows[at : at + BATCH]))
        if run.step % EVERY == 0 or run.step == steps:
            run.save()
            rate = (run.seen - first) / (time.perf_counter() - began)
            print(
                f"{name} {run.step}/{steps} loss {np.mean(losses[-EVERY:]):.3f}, "
                f"{rate:,.0f} tokens/s",
                flush=True,
            )
    return run


# --- how good it is -----------------------------------------------------------


def bigram_nats(stories: list[np.ndarray]):
    """The loss by token of a bigram model fitted to the stories."""
    model = Bigram(_pair(np.concatenate(stories)), VOCABULARY)
    return lambda story: np.full(len(story) - 1, model.loss(_pair(story)))


def _pair(stream: np.ndarray) -> tuple[Tensor, Tensor]:
    tokens = torch.from_numpy(stream)[None]
    return tokens[:, :-1], tokens[:, 1:]


@torch.no_grad()
def nats_of(model, story: np.ndarray) -> np.ndarray:
    tokens = torch.from_numpy(story)[None]
    logits = model(tokens[:, :-1]).logits[0]
    return F.cross_entropy(logits, tokens[0, 1:], reduction="none").numpy()


def measured(nats, texts: list[str], coded: list[np.ndarray]) -> dict[str, float]:
    """Loss of those stories that fit, a token and a character."""
    total, n, characters = 0.0, 0, 0
    for text, story in zip(texts, coded, strict=True):
        if len(story) <= CONTEXT:
            total += float(nats(story).sum(dtype=np.float64))
            n += len(story) - 1
            characters += len(text)
    if n == 0:
        raise SystemExit(f"no test story fits into {CONTEXT} tokens")
    return {"per token": total / n, "per character": total / characters}


@torch.no_grad()
def samples(model, tokenizer, n: int = 3) -> list[str]:
    """Stories drawn at temperature 0.8 within the 40 likeliest tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([tokenizer.encode("Once upon a time")] * n)
    rows = F.pad(rows, (1, 0), value=tokenizer.bos_token_id)
    for _ in range(120):
        top, place = model(rows).logits[:, -1].topk(40)
        drawn = torch.multinomial((top / 0.8).softmax(-1), 1, generator=generator)
        rows = torch.cat([rows, place.gather(1, drawn)], 1)
    texts = tokenizer.batch_decode(rows[:, 1:])
    return [text.split(END)[0].strip() for text in texts]


def reference_scores(folder: Path, texts: dict[str, list[str]]) -> dict:
    """stories15M on the same stories, in its own tokens."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    model = AutoModelForCausalLM.from_pretrained(str(folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder))
    coded = {corpus: encode(tokenizer, part) for corpus, part in texts.items()}
    return {
        corpus: measured(lambda s: nats_of(model, s), part, coded[corpus])
        for corpus, part in texts.items()
    }


# --- what is written ------------------------------------------------------------


def export(name: str, run: Training, tokenizer, out: Path) -> None:
    """float16 weights in the hub's layout, read back and compared."""
    from transformers import GPTNeoForCausalLM

    model = run.model.cpu().half()
    model.config.dtype = torch.float16
    model.save_pretrained(str(out))
    tokenizer.save_pretrained(str(out))
    again = GPTNeoForCausalLM.from_pretrained(
        str(out), dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.arange(2 * CONTEXT).view(2, CONTEXT) * 7 % VOCABULARY
    with torch.no_grad():
        gap = (forward(again, tokens) - again(tokens).logits).abs().max().item()
    size = (out / "model.safetensors").stat().st_size
    print(f"{out}: {size:,} bytes; logits as in transformers to {gap:.0e}", flush=True)
    if gap > 1e-3 or size > 6e6:
        raise SystemExit("the export is not what was trained, or too large")


CARD = """# story-{name}: a GPT-Neo of {layers} that tells stories

A small language model for the story notebooks of this collection: {kinds} attention
(local: {window} tokens back), width {width}, {heads} heads, MLP of {mlp}, context
{context}, tied embeddings, {parameters:,} parameters in float16, and a byte-level BPE
tokenizer of {vocabulary:,} tokens. transformers loads the folder (`GPTNeoForCausalLM`),
and so does `saeutils.models.story_model("story-{name}")`.

## Data
{stories:,} distinct stories, {tokens:,} tokens: {share:.0%} of the tokens are text that
stories15M generated (`scripts/sample_stories.py`), none of them in
`data/stories`, and the rest the story grammar (`saeutils/grammar.py`, seed 0). It is
model-generated text and carries the habits of its source.

## Training
{seen:,} tokens ({epochs:.1f} epochs), {step} of {steps} steps{interim}: Muon and AdamW
on one cosine, {batch} rows of {context} a step. Made by

    python scripts/train_story_models.py TEXT... --steps {steps} \\
        --held-out data/stories/held-out.txt.xz

## Loss on stories that it has not seen (nats)
{table}

stories15M (6 layers, 15.2 M parameters, 32,000 tokens) has another tokenizer: compare
it by character. It wrote the sampled text itself, so that its loss there is about the
least that any model can reach. The bigram model (Kneser-Ney) was fitted to the same
training text.

## Samples (temperature 0.8, top 40, not chosen)
{samples}
"""


def write_card(
    name: str, out: Path, run: Training, facts: dict, scores: dict, drawn: list[str]
) -> None:
    lines = [
        "| model | sampled text, per token | per character | grammar, per token | "
        "per character |",
        "|---|---|---|---|---|",
    ]
    for model, by_corpus in scores.items():
        numbers = [v for c in ("sampled", "grammar") for v in by_corpus[c].values()]
        lines.append(f"| {model} | " + " | ".join(f"{v:.3f}" for v in numbers) + " |")
    kinds = LAYERS[name]
    card = CARD.format(
        name=name,
        layers={1: "one layer", 2: "two layers"}[len(kinds)],
        kinds=", then ".join(kinds),
        window=WINDOW,
        width=WIDTH,
        heads=HEADS,
        mlp=4 * WIDTH,
        context=CONTEXT,
        vocabulary=VOCABULARY,
        parameters=sum(p.numel() for p in run.model.parameters()),
        batch=BATCH,
        seen=run.seen,
        step=run.step,
        steps=run.steps,
        interim="" if run.step >= run.steps else " (INTERIM: training has not ended)",
        epochs=run.seen / facts["tokens"],
        table="\n".join(lines),
        samples="\n\n".join("> " + text.replace("\n", "\n> ") for text in drawn),
        **facts,
    )
    (out / "README.md").write_text(card)


def main(args: argparse.Namespace) -> None:
    from transformers import GPTNeoForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.work.mkdir(parents=True, exist_ok=True)
    held_out = read_stories(args.held_out)
    unseen = {hashlib.sha256(text.encode()).digest() for text in held_out}
    sampled = [
        text
        for path in args.text
        for text in read_stories(path)
        if hashlib.sha256(text.encode()).digest() not in unseen
    ]
    sampled = list(dict.fromkeys(sampled))
    characters = sum(map(len, sampled))
    made: list[str] = []
    while sum(map(len, made)) < characters * GRAMMAR_SHARE / (1 - GRAMMAR_SHARE):
        made += [s.text for s in grammar.stories(500, seed=0, first=len(made))]
    tokenizer = make_tokenizer(sampled + made, args.work / "tokenizer")
    coded = {"sampled": encode(tokenizer, sampled), "grammar": encode(tokenizer, made)}
    stories = coded["sampled"] + coded["grammar"]
    sizes = {corpus: sum(map(len, part)) for corpus, part in coded.items()}
    facts = {
        "stories": len(stories),
        "tokens": sum(sizes.values()),
        "share": sizes["sampled"] / sum(sizes.values()),
    }
    print(facts, f"{characters / sizes['sampled']:.2f} characters a token", flush=True)
    tests = {
        "sampled": held_out[: args.test_stories],
        "grammar": [
            s.text for s in grammar.stories(args.test_stories, first=HELD_OUT_GRAMMAR)
        ],
    }
    test_coded = {corpus: encode(tokenizer, part) for corpus, part in tests.items()}

    def score(nats) -> dict:
        return {c: measured(nats, tests[c], test_coded[c]) for c in tests}

    runs, drawn, scores = {}, {}, {}
    for name in args.models:
        if args.export_only:
            runs[name] = Training(name, args.work, "cpu", args.steps)
        else:
            runs[name] = train(name, stories, args.work, device, args.steps)
        out = args.out / f"story-{name}"
        export(name, runs[name], tokenizer, out)
        model = GPTNeoForCausalLM.from_pretrained(str(out), dtype=torch.float32)
        scores[f"story-{name}"] = score(lambda s, m=model: nats_of(m, s))
        drawn[name] = samples(model, tokenizer)
        print(name, json.dumps(scores[f"story-{name}"]), flush=True)
    scores["bigram"] = score(bigram_nats(stories))
    if args.reference:
        scores["stories15M"] = reference_scores(args.reference, tests)
    for name in args.models:
        out = args.out / f"story-{name}"
        write_card(name, out, runs[name], facts, scores, drawn[name])
        (out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", nargs="+", type=Path, help="files of stories")
    parser.add_argument("--held-out", type=Path, required=True, help="never trained on")
    parser.add_argument("--models", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--steps", type=int, default=1500, help="of 4,096 tokens")
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "story-training")
    parser.add_argument("--reference", type=Path, help="stories15M, for comparison")
    parser.add_argument("--test-stories", type=int, default=500)
    parser.add_argument(
        "--export-only", action="store_true", help="write what has been trained so far"
    )
    return parser.parse_args(given)


if __name__ == "__main__":
    main(arguments())
