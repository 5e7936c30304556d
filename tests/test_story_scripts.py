"""The scripts that make the story models and text, on tiny models."""

import importlib.util
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from saeutils import grammar
from saeutils.stories import END, read_stories

SCRIPTS = Path(__file__).parent.parent / "scripts"
SIZES = dict(dim=16, hidden=24, layers=2, heads=2, kv_heads=2, vocab=300, context=256)


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


assets, sampler, trainer = map(
    script, ("make_assets", "sample_stories", "train_story_models")
)


def llama2c_weights():
    """A file in llama2.c's format, and how many floats it holds."""
    d, h, n, v = (SIZES[name] for name in ("dim", "hidden", "layers", "vocab"))
    floats = v * d + n * (2 * d + 4 * d * d + 3 * d * h) + d + 2 * 256 * 4
    values = np.random.default_rng(0).normal(0, 0.3, floats).astype("<f4")
    return struct.pack("<7i", *SIZES.values()) + values.tobytes()


def llama2c_tokenizer():
    """300 pieces: <unk>, <s>, </s>, all bytes, then letters and what they merge to."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256))]
    merged = ["th", "the", " the", "at", " cat", " c"]
    pieces += [*merged, *" abcdefghijklmnopqrstuvwxyz.,TO"]
    pieces += [f"zz{'z' * i}" for i in range(300 - len(pieces))]
    content = struct.pack("<i", 9)
    for i, piece in enumerate(pieces):
        score = -float(i - 259) if i >= 259 else 0.0
        raw = piece.encode()
        content += struct.pack("<fi", score, len(raw)) + raw
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from safetensors.torch import save_file

    out = tmp_path_factory.mktemp("llama")
    sizes, raw = assets.read_weights(llama2c_weights())
    config, state = assets.to_hub(sizes, raw)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    assets.read_tokenizer(llama2c_tokenizer(), 300).save(str(out / "tokenizer.json"))
    return out


def test_the_converted_model_computes_what_llama2c_computes(folder):
    sizes, raw = assets.read_weights(llama2c_weights())
    assert sizes == SIZES
    tokens = torch.arange(40) * 7 % 300
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    assert theirs.std() > 0.1
    ours = assets.logits_written_out(sizes, raw, tokens)
    assert torch.allclose(ours, theirs, atol=1e-4)
    # Without the permutation of q and k it is another model.
    wrong = {**raw, "q": raw["q"].flip(1)}
    assert not torch.allclose(assets.logits_written_out(sizes, wrong, tokens), theirs)


def test_the_converted_tokenizer_merges_by_score_and_falls_back_to_bytes(folder):
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.tokenize("the cat") == ["▁the", "▁cat"]
    assert "<0xC3>" in tokenizer.tokenize("caté")
    for text in ("the cat sat.", "é, ü"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decoding_with_a_cache_is_the_same_as_without(folder):
    model = sampler.Decoder(folder)
    reference = LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    tokens = torch.randint(300, (5, 12), generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([True, False, True, True, False])
    with torch.no_grad():
        expected = reference(tokens).logits
        model.start(5, 12)
        for t in range(6):
            found = model.step(tokens[:, t])
            assert torch.allclose(found, expected[:, t], atol=1e-4)
        model.keep(keep)
        for t in range(6, 12):
            found = model.step(tokens[keep, t])
            assert torch.allclose(found, expected[keep, t], atol=1e-4)


def test_sampling_goes_on_where_it_stopped_and_keeps_what_ended(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampler, "BATCH", 24)
    for out in ("whole", "halted"):
        file = tmp_path / f"{out}.txt.gz"
        if out == "halted":
            sampler.main(folder, tmp_path / out, file, 100, 1)
            assert (tmp_path / out / "part-00000.jsonl").exists()
        sampler.main(folder, tmp_path / out, file, 1500, 1)
    texts = {o: read_stories(tmp_path / f"{o}.txt.gz") for o in ("whole", "halted")}
    assert texts["whole"] == texts["halted"]
    assert len(set(texts["whole"])) == len(texts["whole"]) > 5
    other = tmp_path / "other.txt.xz"
    sampler.main(folder, tmp_path / "other", other, 500, 2)
    assert set(read_stories(other)) != set(texts["whole"])
    assert not any(END in text or "<s>" in text for text in texts["whole"])


def test_rows_of_an_epoch_hold_every_story_once_in_an_order_of_their_own():
    stories = [np.array([0, *range(10 * i, 10 * i + 9)]) for i in range(1, 200)]
    first, again, second = (trainer.rows_of_epoch(stories, e) for e in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, second)
    assert np.array_equal(first[:-1, -1], first[1:, 0])  # labels go on where rows end
    stream = np.concatenate([first[0], *first[1:, 1:]])
    own = set(stream.tolist()) - {0}
    assert len(own) == len(stream) - (stream == 0).sum()


def test_training_resumes_and_writes_a_model_and_its_card(tmp_path, monkeypatch):
    for name, value in dict(
        WIDTH=24, HEADS=2, VOCABULARY=400, CONTEXT=800, EVERY=2
    ).items():
        monkeypatch.setattr(trainer, name, value)
    texts = [s.text for s in grammar.stories(60, seed=9)]
    for name, part in {"a.txt": texts[:50], "held.txt": texts[40:]}.items():
        content = "".join(f"{text}\n{END}\n" for text in part)
        (tmp_path / name).write_text(content)

    def run(out, steps):
        arguments = [tmp_path / "a.txt", "--held-out", tmp_path / "held.txt"]
        arguments += ["--models", "2L", "--steps", steps, "--test-stories", 3]
        arguments += ["--out", tmp_path / out, "--work", tmp_path / out]
        trainer.main(trainer.arguments([str(a) for a in arguments]))
        return tmp_path / out / "story-2L"

    monkeypatch.setattr(trainer, "BATCH", 2)
    whole = run("whole", 4)
    original = trainer.Training.update
    calls = []

    def stops(self, tokens):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, tokens)

    monkeypatch.setattr(trainer.Training, "update", stops)
    with pytest.raises(KeyboardInterrupt):
        run("halted", 4)
    monkeypatch.setattr(trainer.Training, "update", original)
    halted = run("halted", 4)
    from safetensors.torch import load_file

    weights = [load_file(f / "model.safetensors") for f in (whole, halted)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    card = (whole / "README.md").read_text()
    assert "| bigram |" in card and "INTERIM" not in card
    assert "4 of 4 steps" in card
    scores = json.loads((whole / "scores.json").read_text())
    assert 0 < scores["story-2L"]["grammar"]["per token"] < 7
    assert {"story-2L", "bigram"} == set(scores)
