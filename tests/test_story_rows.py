"""Rows of stories: what is stored, and that tokens and positions are theirs."""

import pytest
import torch

from saeutils import baselines
from saeutils.examples import Codes
from saeutils.models import story_model
from saeutils.stories import stories, tokens
from saeutils.story_rows import story_rows
from saeutils.token_scores import in_context

HOOKS = ["blocks.0.hook_mlp_out", "blocks.0.mlp.hook_post"]


@pytest.fixture(scope="module")
def model():
    return story_model("story-1L")


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    text = stories("test", n=3)
    folder = tmp_path_factory.mktemp("rows")
    return text, folder, story_rows(model, text, HOOKS, folder, context=40)


def test_rows_are_the_tokens_of_the_stories(model, saved):
    text, _, got = saved
    coded = tokens(text, model.tokenizer, 40)
    assert list(got.stores) == HOOKS
    assert got.records["token"].tolist() == got.token.tolist()
    assert got.records["position"].tolist() == got.position.tolist()
    inside = [coded.ids[list(text.ids).index(i)] for i in got.records["id"]]
    assert got.token.tolist() == [
        row[at] for row, at in zip(inside, got.position.tolist(), strict=True)
    ]
    assert got.previous.tolist() == [
        row[at - 1] for row, at in zip(inside, got.position.tolist(), strict=True)
    ]
    with torch.no_grad():
        _, cache = model.run_with_cache(got.pair[0], names_filter=HOOKS)
    for hook, store in got.stores.items():
        want = cache[hook][got.where]
        assert torch.allclose(store[:], want, rtol=1e-3, atol=1e-2)


def test_a_second_call_opens_and_other_stories_live_elsewhere(model, saved):
    text, folder, got = saved
    again = story_rows(model, text, HOOKS, folder, context=40)
    assert again.stores[HOOKS[0]].fingerprint == got.stores[HOOKS[0]].fingerprint
    other = story_rows(model, text.take([2, 1, 0]), HOOKS[:1], folder, context=40)
    assert set(other.records["id"]) == set(got.records["id"])
    assert other.token.tolist() != got.token.tolist()
    longer = story_rows(model, text, HOOKS[:1], folder, context=50)
    assert len(longer.token) > len(got.token)


def test_a_latent_is_shown_where_it_is_strongest(model, saved):
    _, _, got = saved
    store = got.stores[HOOKS[1]]
    shown = in_context(Codes(None, store), [5, 9], model.tokenizer, n=2, after=3)
    assert len(shown) == 4 and all(name.startswith("latent ") for name in shown)
    values = store[:][:, 5].numpy()
    place = int(values.argmax())
    name = f"latent 5, story {got.records['id'][place]}"
    words, activations = shown[name]
    assert len(words) == len(activations) and activations.max() == values[place]
    own = words[int(activations.argmax())]
    assert own.strip() == model.tokenizer.decode([got.token[place]]).strip()
    silent = baselines.Dictionary(torch.zeros(2, store.d_in), torch.zeros(store.d_in))
    assert in_context(Codes(silent, store), [0], model.tokenizer) == {}
