"""What is shown of a latent: contexts, tokens, positions, effect on the logits."""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saeutils import reading
from saeutils.activations import save_activations
from saeutils.baselines import Dictionary
from saeutils.codes import encode
from saeutils.context import token_texts
from saeutils.examples import Codes, StoredCodes, at_quantiles, top_examples
from saeutils.models import story_model
from saeutils.store import TensorStore
from saeutils.stories import stories, tokens

HOOK = "blocks.0.hook_mlp_out"


class Plain:
    """An SAE that passes its rows on."""

    W_dec = torch.eye(2)

    def encode(self, x):
        return x.relu()

    def decode(self, z):
        return z


def stored(z, records, path):
    return encode(Plain(), TensorStore(z, records), path, progress=False)


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A story model, text, an SAE of two real directions, and its codes."""
    model = story_model("story-1L")
    coded = tokens(stories("test", "embedded", n=6), model.tokenizer, 48)
    folder = tmp_path_factory.mktemp("story")
    rows = save_activations(
        model,
        coded.ids,
        HOOK,
        folder / "rows",
        provenance={"id": coded.documents},
        progress=False,
    )[HOOK]
    directions = torch.nn.functional.normalize(rows[:][[5, 40]], dim=1)
    sae = Dictionary(directions, rows[:].mean(0), signed=False)
    return model, coded, sae, encode(sae, rows, folder / "codes", progress=False)


# --- quantiles ----------------------------------------------------------------


def test_quantiles_known_answer(tmp_path):
    """A hundred stories of two tokens; latent 0 fires 1 … 100, latent 1 once."""
    values = torch.arange(1.0, 101)
    z = torch.stack([values, values * 0 - 1], 1).repeat_interleave(2, 0)
    z[1::2, 0] = 0
    z[30, 1] = 7
    records = pd.DataFrame({"id": np.arange(200) // 2, "position": np.arange(200) % 2})
    codes = stored(z, records, tmp_path / "codes")
    top, middle, low = at_quantiles(codes, 0, (1, 0.5, 0), n=3)
    assert top.values.tolist() == [100, 99, 98] and top.rows.tolist() == [198, 196, 194]
    assert middle.values.tolist() == [50, 51, 49]
    assert low.values.tolist() == [1, 2, 3]
    (only,) = at_quantiles(codes, 1, (0.5,), n=3)
    assert only.rows.tolist() == [30] and only.values.tolist() == [7]


@settings(max_examples=25)
@given(st.integers(0, 10_000))
def test_the_order_of_rows_does_not_matter(tmp_path_factory, seed):
    g = np.random.default_rng(seed)
    records = pd.DataFrame(
        {"id": np.repeat(np.arange(9), 5), "position": [*range(5)] * 9}
    )
    z = torch.from_numpy(g.integers(-1, 4, (45, 2)).astype("f4"))  # many ties
    z[0] = 1
    order, folder = g.permutation(45), tmp_path_factory.mktemp("order")
    got = []
    for name, index in {"a": np.arange(45), "b": order}.items():
        mine = records.iloc[index].reset_index(drop=True)
        codes = stored(z[index], mine, folder / name)
        found = at_quantiles(codes, 0, (1, 0.5, 0.1), n=2)
        got.append([mine.iloc[x.rows.numpy()].to_numpy().tolist() for x in found])
        ids = [i for part in got[-1] for i, _ in part]
        assert len(ids) == len(set(ids))  # a story is shown once in all
        assert all((x.values > 0).all() for x in found)
    assert got[0] == got[1]


def test_stories_run_out_before_rows_do(tmp_path):
    records = pd.DataFrame({"id": [1, 1, 1, 2], "position": [1, 2, 3, 1]})
    codes = stored(torch.ones(4, 2), records, tmp_path / "codes")
    first, second = at_quantiles(codes, 0, (1, 0.5), n=3)
    assert len(first.rows) == 2 and len(second.rows) == 0


def test_bad_input_is_refused(tmp_path, unchecked):
    codes = stored(-torch.ones(4, 2), None, tmp_path / "codes")
    with pytest.raises(ValueError, match="latent 0 never fires"):
        at_quantiles(codes, 0)
    with pytest.raises(ValueError, match="0 ≤ q ≤ 1"):
        at_quantiles(codes, 0, (2,))
    with pytest.raises(ValueError, match="n ≥ 1"):
        at_quantiles(codes, 0, n=0)
    with pytest.raises(IndexError, match="latent 9"):
        at_quantiles(codes, 9)


def test_stored_codes_are_those_that_encoding_gives(tmp_path):
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    records = pd.DataFrame({"id": np.arange(50) // 5, "position": [*range(5)] * 10})
    direct = Codes(Plain(), TensorStore(z, records))
    kept = StoredCodes(stored(z, records, tmp_path / "codes"), chunk=7)
    assert (kept.d_sae, kept.n_rows) == (2, 50) and kept.ids.equal(direct.ids)
    for latent in range(2):
        for a, b in zip(
            top_examples(direct, 4)[latent], top_examples(kept, 4)[latent], strict=True
        ):
            assert a == b if not isinstance(a, torch.Tensor) else a.equal(b)


# --- contexts, tokens, positions ----------------------------------------------


def test_snippets_show_the_text_and_the_activations(story):
    model, coded, _, codes = story
    found = reading.snippets(codes, 0, model.tokenizer, quantiles=(1, 0.5), n=2)
    assert [x.group for x in found] == ["strongest"] * 2 + ["quantile 0.5"] * 2
    rows, values = codes.column(0)
    assert found[0].values[found[0].place] == values.max()
    row = int(rows[values.argmax()])
    record = codes.provenance.iloc[row]
    text = coded.ids[coded.documents.tolist().index(record["id"])]
    at = record["position"]
    window = text[max(1, at - 12) : at + 9].tolist()
    tail = [t for t in window if t != model.tokenizer.pad_token_id]
    assert "".join(found[0].tokens).startswith(model.tokenizer.decode(tail[:5]))
    dense = torch.zeros(len(codes)).index_put_((rows,), values)
    first = row - found[0].place
    want = dense[first : first + len(found[0].tokens)]
    assert found[0].values.tolist() == want.tolist()


def test_tokens_and_positions_are_counted(tmp_path):
    token = [3, 3, 4, 5, 3, 4]
    position = [1, 2, 3, 4, 5, 9]
    records = pd.DataFrame({"id": [0] * 6, "position": position, "token": token})
    z = torch.tensor([[2.0, 0], [0, 0], [1, 0], [0, 0], [4, 0], [5, 0]])
    codes = stored(z, records, tmp_path / "codes")

    class Letters:
        def encode(self, text, add_special_tokens):
            return [0]

        def decode(self, ids):
            return "".join("abcdef"[i] for i in ids)

    frame = reading.by_token(codes, 0, Letters())
    assert frame.token.tolist() == ["d", "e"] and frame.fires.tolist() == [2, 2]
    assert frame["rows"].tolist() == [3, 2] and frame["mean"].tolist() == [3, 3]
    assert frame.share.tolist() == [2 / 3, 1] and frame.of_firings.tolist() == [
        0.5,
        0.5,
    ]
    start, share = reading.by_position(codes, 0)
    assert start.tolist() == [1, 2, 4, 8] and share.tolist() == [1, 0.5, 0.5, 1]


def test_texts_of_tokens_join_to_the_text(story):
    tokenizer = story[0].tokenizer
    text = "a dog said, “No!” Tom’s toy"
    ids = tokenizer.encode(text, add_special_tokens=False)
    plain = [t for t in token_texts(tokenizer, ids) if "�" not in t]
    assert all(t in text for t in plain) and " dog" in plain


def test_a_tokenizer_that_drops_blanks_is_seen_through():
    class Sentences:
        """Like SentencePiece: a blank in front is lost."""

        words = ("▁a", "▁dog", "s")

        def encode(self, text, add_special_tokens):
            return [0]

        def decode(self, ids):
            return "".join(self.words[i] for i in ids).replace("▁", " ").lstrip(" ")

    assert token_texts(Sentences(), [1, 2, 0]) == [" dog", "s", " a"]


# --- effect on the logits -----------------------------------------------------


def test_the_effect_is_what_the_model_itself_does(story):
    """In the last layer the direct path is all: take the latent out, and compare."""
    from saeutils.splicing import edited

    model, coded, sae, codes = story
    got = reading.logit_effect(
        model, HOOK, sae, codes, 0, coded.ids, coded.documents, rows=10**6, draws=2
    )
    rows, values = codes.column(0)
    records = codes.provenance.iloc[rows.numpy()]
    at = [coded.documents.tolist().index(i) for i in records["id"]]
    where = (torch.tensor(at), torch.tensor(records["position"].to_list()))
    z = torch.zeros(coded.ids.shape).index_put_(where, values)[..., None]
    ids = torch.from_numpy(coded.ids)
    with torch.no_grad():
        with_it = model(ids)
        with edited(model, HOOK, lambda acts: acts - z * sae.W_dec[0]):
            without = model(ids)
    want = (with_it - without)[where].mean(0)
    torch.testing.assert_close(got.logits, want - want.mean(), atol=2e-4, rtol=1e-3)
    assert got.n == len(rows) and got.random.shape == (2, model.cfg.d_vocab)
    up, down = got.strongest(3)
    assert got.logits[up[0]] == got.logits.max()
    assert got.logits[down[0]] == got.logits.min()


def test_a_random_direction_moves_as_much_as_chance(story):
    model, coded, sae, codes = story
    noise = torch.randn(
        2, sae.W_dec.shape[1], generator=torch.Generator().manual_seed(3)
    )
    random = Dictionary(torch.nn.functional.normalize(noise, dim=1), sae.b_dec)
    effect = reading.logit_effect(
        model, HOOK, random, codes, 0, coded.ids, coded.documents, draws=64
    )
    assert 0.5 < effect.beyond_chance < 2
    high, low = effect.by_chance
    assert low < 0 < high and abs(effect.logits.mean()) < 1e-4


def test_wrong_hooks_and_silent_latents_are_refused(story, unchecked):
    model, coded, sae, codes = story
    wide = Dictionary(torch.eye(768)[:2], torch.zeros(768))
    text = coded.ids, coded.documents
    with pytest.raises(ValueError, match="768 wide, the residual stream 192"):
        reading.logit_effect(model, "blocks.0.mlp.hook_post", wide, codes, 0, *text)
    with pytest.raises(ValueError, match="hook_nowhere"):
        reading.logit_effect(model, "blocks.0.hook_nowhere", sae, codes, 0, *text)


# --- whom to read -------------------------------------------------------------


def test_latents_are_chosen_by_rank_alone():
    scores = np.array([0.5, np.nan, 0.1, 0.9, 0.7, 0.3])
    allowed = np.array([True, True, True, False, True, True])
    assert reading.chosen_by_rank(scores, allowed, (1, 0.5, 0)) == [4, 0, 2]
    with pytest.raises(ValueError, match="2 candidates for 3 ranks"):
        reading.chosen_by_rank(scores[:4], allowed[:4])
