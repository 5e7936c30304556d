"""Sample stories from a local Llama such as assets/stories15M.

    python scripts/sample_stories.py OUT --tokens 3_700_000 --seed 1
    python scripts/sample_stories.py HELD --tokens 560_000 --seed 2 \
        --file data/stories/held-out.txt.xz

Temperature 0.9, nucleus 0.95 within the 48 likeliest tokens; only stories that end
within 250 tokens are kept, each text once. OUT becomes a folder of parts, each drawn
from (seed, part) alone: an interrupted run goes on where it stopped. When enough
tokens are there, the file is written: every story followed by `<|endoftext|>`.

The output layer is 60 % of the work, and of its 32,000 tokens most are of other
languages: the first stories are drawn with all of them, and what was never among the
48 likeliest then is left out. Use one thread: on a busy machine more are slower.
"""

import argparse
import gzip
import json
import lzma
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

TEMPERATURE, NUCLEUS, TOP, LONGEST = 0.9, 0.95, 48, 250
BATCH = 96
END = "<|endoftext|>"
ASSET = Path(__file__).resolve().parent.parent / "assets" / "stories15M"


class Decoder:
    """A Llama with a key-value cache, for rows that all stand at one position."""

    def __init__(self, folder: Path):
        state = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.n_layers = (
            config[f"num_{name}"] for name in ("attention_heads", "hidden_layers")
        )
        self.width = config["hidden_size"] // self.heads
        self.embed = state["model.embed_tokens.weight"]
        self.vocabulary = torch.arange(len(self.embed))
        self.head, self.norm = self.embed, state["model.norm.weight"]
        self.layers = []
        for i in range(self.n_layers):
            w = {
                name.removeprefix(f"model.layers.{i}."): tensor
                for name, tensor in state.items()
                if name.startswith(f"model.layers.{i}.")
            }
            qkv = [w[f"self_attn.{x}_proj.weight"] for x in "qkv"]
            gate_up = [w[f"mlp.{x}_proj.weight"] for x in ("gate", "up")]
            self.layers.append(
                (
                    w["input_layernorm.weight"],
                    torch.cat(qkv),
                    w["self_attn.o_proj.weight"],
                    w["post_attention_layernorm.weight"],
                    torch.cat(gate_up),
                    w["mlp.down_proj.weight"],
                )
            )
        speed = config["rope_theta"] ** (-torch.arange(0, self.width, 2) / self.width)
        angle = torch.arange(config["max_position_embeddings"])[:, None] * speed
        self.cos, self.sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))
        self.eps = config["rms_norm_eps"]

    def restrict(self, vocabulary: Tensor) -> None:
        """From now on only these tokens can come next."""
        self.vocabulary, self.head = vocabulary, self.embed[vocabulary].clone()

    def start(self, rows: int, length: int) -> None:
        shape = (self.n_layers, rows, self.heads, length, self.width)
        self.keys, self.values, self.length = torch.empty(shape), torch.empty(shape), 0

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (a mask) only; the cache stays where it is."""
        place = rows.nonzero().flatten()
        for i in range(self.n_layers):
            for cache in (self.keys, self.values):
                cache[i, : len(place), :, : self.length] = cache[
                    i, place, :, : self.length
                ]
        self.keys, self.values = (
            cache[:, : len(place)] for cache in (self.keys, self.values)
        )

    def step(self, tokens: Tensor) -> Tensor:
        """Logits (rows, vocabulary) after one more token a row."""
        t, x = self.length, self.embed[tokens]
        for i, (norm_attn, qkv, o, norm_mlp, gate_up, down) in enumerate(self.layers):
            split = (self._norm(x, norm_attn) @ qkv.T).view(len(x), 3, self.heads, -1)
            q, k, v = split.unbind(1)
            self.keys[i, :, :, t], self.values[i, :, :, t] = self._turned(k), v
            mixed = F.scaled_dot_product_attention(
                self._turned(q)[:, :, None],
                self.keys[i, :, :, : t + 1],
                self.values[i, :, :, : t + 1],
            )
            x = x + mixed.flatten(1) @ o.T
            gate, up = (self._norm(x, norm_mlp) @ gate_up.T).chunk(2, dim=-1)
            x = x + (F.silu(gate) * up) @ down.T
        self.length += 1
        return self._norm(x, self.norm) @ self.head.T

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, self.eps)

    def _turned(self, x: Tensor) -> Tensor:
        low, high = x.chunk(2, dim=-1)
        cos, sin = self.cos[self.length], self.sin[self.length]
        return x * cos + torch.cat((-high, low), -1) * sin


@torch.no_grad()
def sample(
    model: Decoder, n: int, bos: int, ends: set[int], seed: int
) -> tuple[list[list[int]], Tensor]:
    """The token ids of those of n stories that ended; which tokens were candidates."""
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = torch.arange(n), torch.full((n,), bos)
    going = torch.ones(n, dtype=torch.bool)
    stories: list[list[int]] = [[] for _ in range(n)]
    ended, seen = [], torch.zeros(len(model.embed), dtype=torch.bool)
    model.start(n, LONGEST + 1)
    for _ in range(LONGEST + 1):
        top, place = model.step(tokens).topk(TOP)
        seen[model.vocabulary[place.flatten()]] = True
        p = (top / TEMPERATURE).softmax(-1)
        p[p.cumsum(-1) - p >= NUCLEUS] = 0
        drawn = torch.multinomial(p, 1, generator=generator)
        tokens = model.vocabulary[place.gather(1, drawn).squeeze(1)]
        for i in going.nonzero().flatten().tolist():
            if (token := tokens[i].item()) in ends:
                going[i] = False
                ended.append(rows[i].item())
            else:
                stories[rows[i]].append(token)
        if not going.any():
            break
        if going.sum() < 0.85 * len(rows):  # moving the cache is work, too
            rows, tokens = rows[going], tokens[going]
            model.keep(going)
            going = going[going]
    return [stories[row] for row in sorted(ended)], seen


def live_vocabulary(model: Decoder, bos: int, ends: set[int], path: Path) -> Tensor:
    """Tokens that are ever candidates in 192 stories with the whole vocabulary."""
    if not path.exists():
        seen = torch.zeros(len(model.embed), dtype=torch.bool)
        for seed in range(2):
            seen |= sample(model, BATCH, bos, ends, seed)[1]
        write(path, json.dumps(seen.nonzero().flatten().tolist()))
    return torch.tensor(json.loads(path.read_text()))


def write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def main(folder: Path, out: Path, file: Path, wanted: int, seed: int) -> None:
    from tokenizers import Tokenizer

    model = Decoder(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = (tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    out.mkdir(parents=True, exist_ok=True)
    ends = {bos, eos}
    model.restrict(live_vocabulary(model, bos, ends, out / "vocabulary.json"))
    print(f"{len(model.vocabulary):,} of {len(model.embed):,} tokens", flush=True)
    known: set[str] = set()
    total, part, began, fresh = 0, 0, time.perf_counter(), 0
    while total < wanted:
        path = out / f"part-{part:05}.jsonl"
        if not path.exists():
            ids, _ = sample(model, BATCH, bos, ends, seed * 1_000_000 + part)
            lines = [(len(story) + 1, tokenizer.decode(story).strip()) for story in ids]
            write(path, "".join(json.dumps(line) + "\n" for line in lines))
            fresh += sum(n for n, _ in lines)
        for line in path.read_text().splitlines():
            n, text = json.loads(line)
            if text and text not in known:
                known.add(text)
                total += n
        part += 1
        rate = fresh / (time.perf_counter() - began)
        print(f"{part} {total:,} tokens, {rate:,.0f} a second", flush=True)
    stories = "".join(f"{text}\n{END}\n" for text in dict.fromkeys(_texts(out, part)))
    content = stories.encode()
    packed = (
        lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
        if file.suffix == ".xz"
        else gzip.compress(content, mtime=0)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(packed)
    print(f"{file}: {len(known):,} stories, {total:,} tokens, {len(packed):,} bytes")


def _texts(out: Path, parts: int):
    for part in range(parts):
        for line in (out / f"part-{part:05}.jsonl").read_text().splitlines():
            if text := json.loads(line)[1]:
                yield text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the parts")
    parser.add_argument("--file", type=Path, help=".txt.gz or .txt.xz [OUT.txt.gz]")
    parser.add_argument("--model", type=Path, default=ASSET, help="local folder")
    parser.add_argument("--tokens", type=int, default=3_700_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    file = args.file or args.out.with_suffix(".txt.gz")
    main(args.model, args.out, file, args.tokens, args.seed)
