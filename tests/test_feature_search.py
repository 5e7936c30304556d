"""Search by examples, on a tokenizer and a model small enough to see through."""

import types

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn

from saeutils.baselines import Dictionary
from saeutils.feature_search import find_latents, text_activations
from saeutils.models import story_model

WORDS = ["the", "dog", "cat", "ran", "sat", ".", "big", "small"]


class Tokenizer:
    """A token a word, with the blank before it."""

    bos_token_id = eos_token_id = pad_token_id = len(WORDS)

    def __call__(self, texts, add_special_tokens, return_offsets_mapping=False):
        out = {"input_ids": [], "offset_mapping": []}
        for text in texts:
            ids, spans, at = [], [], 0
            for word in text.split(" "):
                start = at if at == 0 else at - 1
                ids.append(WORDS.index(word))
                spans.append((start, at + len(word)))
                at += len(word) + 1
            out["input_ids"].append(ids)
            out["offset_mapping"].append(spans)
        return out


@pytest.fixture(scope="module")
def model():
    """Activations are one-hot tokens: latent i is word i."""
    model = nn.Module()
    model.embed = nn.Embedding.from_pretrained(torch.eye(len(WORDS) + 1))
    model.forward = types.MethodType(lambda self, x: self.embed(x), model)
    model.tokenizer = Tokenizer()
    model.cfg = types.SimpleNamespace(n_ctx=12, d_vocab=len(WORDS) + 1)
    return model


SAE = Dictionary(2 * torch.eye(9)[:8], torch.zeros(9), signed=False)


def search(model, positive, negative=(), **how):
    return find_latents(model, "embed", SAE, positive, negative, **how)


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_fires_on_the_one_and_not_on_the_other(model):
    found = search(model, ["the dog ran", "dog sat"], ["the cat ran", "cat sat"])
    assert found.table.latent.tolist() == [WORDS.index("dog")]
    assert found.left == {
        "latents": 8,
        "fire on the positive": 1,
        "silent on the negative": 1,
    }
    row = found.table.iloc[0]
    assert (row["fires, positive"], row["fires, negative"]) == (1, 0)
    assert row.score == row["mean, positive"] == 4  # 2, times the decoder's length


def test_only_what_is_marked_counts(model):
    got = text_activations(model, "embed", SAE, ["the «dog» ran", "the dog ran"])
    assert np.flatnonzero(got[0]).tolist() == [WORDS.index("dog")]
    assert len(np.flatnonzero(got[1])) == 3
    found = search(model, ["the «dog» ran"], ["the dog «ran»"])
    assert found.table.latent.tolist() == [WORDS.index("dog")]


def test_padding_and_bos_never_count(model):
    one = text_activations(model, "embed", SAE, ["dog"])
    both = text_activations(model, "embed", SAE, ["dog", "the big cat sat ."])
    assert (one[0] == both[0]).all()


def test_the_order_of_texts_does_not_matter(model):
    positive, negative = ["the dog ran", "dog sat .", "big dog"], ["cat ran", "the cat"]
    a = search(model, positive, negative, least=0.6, most=0.5)
    b = search(model, positive[::-1], negative[::-1], least=0.6, most=0.5)
    assert a.table.equals(b.table) and a.left == b.left


def test_shares_loosen_the_filter(model):
    positive, negative = ["dog ran", "dog sat", "cat ran"], ["dog big", "small"]
    assert len(search(model, positive, negative).table) == 0
    loose = search(model, positive, negative, least=0.6, most=0.5)
    assert [WORDS[i] for i in loose.table.latent] == ["ran", "dog"]


def test_an_empty_search_is_an_empty_table_not_an_error(model):
    found = search(model, ["dog", "cat"], ["the"])
    assert len(found.table) == 0 and "score" in found.table
    assert found.left["fire on the positive"] == 0 and found.p == 1


def test_without_negative_texts_there_is_no_null(model):
    found = search(model, ["dog ran", "dog sat"])
    assert found.table.latent.tolist() == [WORDS.index("dog")]
    assert np.isnan([found.by_chance, found.score_by_chance, found.p]).all()


def test_chance_is_what_dealt_texts_reach(model):
    """With texts that say the same, no deal is better than another."""
    texts = ["dog ran"] * 4
    found = search(model, texts, texts, most=1.0, seed=1)
    assert found.by_chance == 2 and found.p == 1
    planted = search(model, ["dog"] * 6, ["cat"] * 6, shuffles=200)
    assert planted.p < 0.05 and planted.score_by_chance < 4


def test_bad_input_is_refused(model, unchecked):
    with pytest.raises(ValueError, match="no positive text"):
        search(model, [])
    with pytest.raises(ValueError, match="no positive text"):
        search(model, "dog")
    with pytest.raises(ValueError, match="has letters"):
        search(model, ["dog", " "])
    with pytest.raises(ValueError, match="marks in pairs"):
        search(model, ["the «dog ran"])
    with pytest.raises(ValueError, match="nothing but blanks"):
        search(model, ["the« »dog"])
    with pytest.raises(ValueError, match=r"13 tokens: the model sees 12"):
        search(model, [" ".join(["dog"] * 12)])
    with pytest.raises(ValueError, match="are shares"):
        search(model, ["dog"], least=2)


def test_on_a_story_model():
    """A direction read off a word's own activations is found by that word."""
    model, hook = story_model("story-1L"), "blocks.0.hook_mlp_out"
    ids = torch.tensor([model.tokenizer.encode("The dog was very happy.")])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, names_filter=[hook])
    rows = torch.nn.functional.normalize(cache[hook][0], dim=1)
    sae = Dictionary(rows, torch.zeros(rows.shape[1]), k=1, signed=False)
    found = find_latents(model, hook, sae, ["The dog was very «happy»."])
    words = [model.tokenizer.decode([i]) for i in ids[0]]
    assert "happy" in words[found.table.latent[0]]
