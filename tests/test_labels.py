"""Automatic labels: planted ones are found, judged elsewhere, and beat dealt ones."""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score, roc_auc_score

from saeutils import grammar, labels
from saeutils.baselines import Dictionary
from saeutils.codes import encode
from saeutils.examples import Codes
from saeutils.facts import Facts, row_before, row_concepts, row_facts
from saeutils.labels import BEST, Label
from saeutils.stories import stories, tokens


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


class Words:
    """A tokenizer of which token i reads " i"."""

    def encode(self, text, add_special_tokens):
        return [0]

    def decode(self, ids):
        return "".join(f" {i}" for i in ids)


def planted(seed, n_stories=30, length=20, vocabulary=12):
    """Latent 0 fires on tokens 3 and 5, latent 1 after token 7, latent 2 on concept 1,
    latent 3 at random, latent 4 never."""
    g = np.random.default_rng(seed)
    n = n_stories * length
    token = g.integers(vocabulary, size=n)
    records = pd.DataFrame(
        {"id": np.repeat(np.arange(n_stories), length), "token": token}
    ).assign(position=np.tile(np.arange(1, length + 1), n_stories))
    member = g.random((n, 2)) < 0.2
    known = row_facts(records, ["a", "b"], member)
    after = known.properties["after"]
    fires = [np.isin(token, [3, 5]), after == 7, member[:, 1], g.random(n) < 0.1]
    z = np.stack([*fires, np.zeros(n)], 1) * g.uniform(1, 2, (n, 5))
    return torch.from_numpy(z.astype("f4")), known, records


# --- what is known of rows ----------------------------------------------------


def test_the_row_before_is_found_by_story_and_position():
    records = pd.DataFrame({"id": [5, 5, 9, 5, 9], "position": [2, 1, 1, 4, 2]})
    assert row_before(records).tolist() == [1, -1, -1, -1, 2]


def test_facts_of_the_token_before():
    records = pd.DataFrame({"id": [5, 5, 9], "position": [1, 2, 1], "token": [7, 8, 7]})
    known = row_facts(records, ["a"], np.array([[True], [False], [False]]))
    assert known.concepts == ["a", "after a"]
    assert known.member.tolist() == [[True, False], [False, True], [False, False]]
    assert known.properties["after"].tolist() == [-1, 7, -1]
    assert row_facts(records).member.shape == (3, 0)


def test_concepts_come_by_id_and_position_whatever_the_order():
    from transformers import AutoTokenizer

    from saeutils.datasets import data_folder

    tokenizer = AutoTokenizer.from_pretrained(str(data_folder() / "story-1L"))
    data = stories("test", "grammar", n=3)
    coded = tokens(data, tokenizer, 40)
    order = np.random.default_rng(0).permutation(3 * 39)
    ids, position = np.repeat(data.ids, 39)[order], np.tile(np.arange(1, 40), 3)[order]
    records = pd.DataFrame({"id": ids, "position": position})
    names = ["punctuation", "name"]
    member = row_concepts(records, coded, names)
    for i, (story, place) in enumerate(zip(ids, position, strict=True)):
        row = data.ids.tolist().index(story)
        start, stop = coded.spans[row][place]
        words = [
            w
            for w in grammar.story(0, int(story)).words
            if w.start < stop and w.stop > start
        ]
        truth = [any(name in w.concepts for w in words) for name in names]
        assert member[i].tolist() == truth
    with pytest.raises(ValueError, match="story 7 is not among"):
        row_concepts(records.assign(id=7), coded, names)


# --- labels -------------------------------------------------------------------


def test_planted_labels_are_found():
    z, known, _ = planted(0)
    made = labels.automatic_labels(labels.count(Codes(None, z), known))
    assert [x.latent for x in made] == [0, 1, 2, 3]  # the silent one has none
    assert (made[0].kind, set(made[0].values)) == ("on", {3, 5})
    assert (made[1].kind, made[1].values) == ("after", (7,))
    assert (made[2].kind, made[2].values) == (labels.CONCEPT, (1,))
    assert [x.f1 for x in made[:3]] == [1, 1, 1] and made[3].f1 < 0.4
    assert made[2].text(known.concepts, Words()) == "concept b"
    assert made[1].text(known.concepts, Words()) == "after “ 7”"


def test_planted_labels_hold_elsewhere_and_dealt_ones_do_not():
    z, known, _ = planted(0)
    fresh, truth, _ = planted(1)
    judged = labels.by_kind(Codes(None, z), Codes(None, fresh), (known, truth))
    assert list(judged) == [labels.CONCEPT, "on", "after", BEST]
    scores, dealt = judged[BEST].scores, judged[BEST].dealt
    assert scores.f1[:3].tolist() == [1, 1, 1] == scores.auc[:3].tolist()
    assert abs(scores.auc[3] - 0.5) < 0.06 and scores.f1[3] < 0.3
    assert dealt.f1.max() < 0.4 and abs(dealt.auc - 0.5).max() < 0.1
    row = judged[BEST].row()
    assert row["latents"] == 4 and row["F1"] == pytest.approx(scores.f1.mean())
    assert judged["on"].scores.f1[1] < 0.5  # the wrong kind


@given(st.integers(0, 1000))
def test_the_order_of_rows_does_not_matter(seed):
    z, known, records = planted(seed, n_stories=8)
    member = known.member[:, :2]
    order = np.random.default_rng(seed).permutation(len(z))
    results = []
    for index in (np.arange(len(z)), order):
        mine = records.iloc[index].reset_index(drop=True)
        here = row_facts(mine, ["a", "b"], member[index])
        codes = Codes(None, z[index], budget=4 * 5 * 50)
        made = labels.automatic_labels(labels.count(codes, here), least=3)
        results.append((made, labels.judge(codes, here, made)))
    assert results[0][0] == results[1][0]
    np.testing.assert_allclose(results[0][1], results[1][1])


@given(st.integers(0, 1000))
def test_scores_equal_those_of_sklearn(seed):
    z, known, _ = planted(seed, n_stories=6)
    made = [
        Label(0, "on", (3, 5), 0.0),
        Label(1, "after", (2,), 0.0),
        Label(3, labels.CONCEPT, (0,), 0.0),
        Label(4, "on", (1,), 0.0),  # never fires
    ]
    codes = Codes(None, z)
    got = labels.judge(codes, known, made)
    on, after = known.properties["on"], known.properties["after"]
    truth = [np.isin(on, [3, 5]), after == 2, known.member[:, 0], on == 1]
    for i, label in enumerate(made):
        own, true = z[:, label.latent].numpy(), truth[i]
        if not true.any():
            assert np.isnan(got.f1[i])
            continue
        want = f1_score(own > 0, true, zero_division=0)
        assert got.f1[i] == pytest.approx(want)
        assert got.auc[i] == pytest.approx(roc_auc_score(true, own))


def test_a_label_names_as_many_tokens_as_help_and_no_more():
    on = np.repeat(np.arange(4), 10)
    fires = (on < 3) & (np.arange(40) % 10 < np.array([10, 9, 1, 0])[on])
    known = Facts([], np.zeros((40, 0), bool), {"on": on})
    counts = labels.count(
        Codes(None, torch.from_numpy(fires.astype("f4"))[:, None]), known
    )
    (label,) = labels.automatic_labels(counts, least=1)
    assert label.values == (0, 1) and label.f1 == pytest.approx(2 * 19 / (20 + 20))
    (one,) = labels.automatic_labels(counts, least=1, most=1)
    assert one.values == (0,) and labels.automatic_labels(counts, least=21) == []


def test_dealing_leaves_no_label_at_home():
    made = [Label(3 * i, "on", (0,), 0.0) for i in range(7)]
    for seed in range(5):
        dealt = labels.deal(made, seed=seed)
        assert sorted(dealt) == [x.latent for x in made]
        assert not any(a == x.latent for a, x in zip(dealt, made, strict=True))


def test_a_token_that_does_not_occur_covers_no_row():
    z, known, _ = planted(0)
    got = labels.judge(Codes(None, z), known, [Label(0, "on", (999,), 1.0)])
    assert np.isnan(got.f1[0]) and np.isnan(got.auc[0])


def test_a_label_can_hold_for_strong_firings_alone(tmp_path):
    token = np.array([3] * 4 + [5] * 8 + [6] * 4)
    z = torch.zeros(16, 2)
    z[:12, 0] = torch.arange(12.0, 0, -1)
    records = pd.DataFrame({"id": [0] * 16, "position": range(16), "token": token})
    known = row_facts(records, ["a"], (token == 5)[:, None])
    order = np.random.default_rng(0).permutation(16)  # of rows: does not matter
    for index in (np.arange(16), order):
        here = row_facts(
            records.iloc[index].reset_index(drop=True), ["a"], known.member[index, :1]
        )
        sae = Dictionary(torch.eye(2), torch.zeros(2), signed=False)
        codes = encode(sae, z[index], tmp_path / f"{index[0]}", progress=False)
        strong = labels.coverage(codes, here, Label(0, "on", (3, 6), 0.0), 3)
        assert strong.tolist() == [1, 0, 0]
        weak = labels.coverage(codes, here, Label(0, labels.CONCEPT, (0,), 0.0), 3)
        assert weak.tolist() == [0, 1, 1]
        silent = labels.coverage(codes, here, Label(1, "on", (3,), 0.0))
        assert np.isnan(silent).all()
    with pytest.raises(ValueError, match="16 rows of activations, facts of 15"):
        fewer = row_facts(records.iloc[:15])
        labels.coverage(codes, fewer, Label(0, "on", (3,), 0.0))


def test_bad_input_is_refused(unchecked):
    z, known, _ = planted(0)
    codes, made = Codes(None, z), [Label(0, "on", (3,), 1.0), Label(1, "on", (3,), 1.0)]
    with pytest.raises(ValueError, match="600 rows of activations, 599 of 'concepts'"):
        labels.count(codes, known._replace(member=known.member[1:]))
    with pytest.raises(ValueError, match="cannot be called 'concept'"):
        labels.count(codes, known._replace(properties={"concept": np.zeros(600, int)}))
    with pytest.raises(ValueError, match="each once"):
        labels.judge(codes, known, made, [2, 2])
    counts = labels.count(codes, known)
    with pytest.raises(ValueError, match=r"\['colour'\] are none of"):
        labels.automatic_labels(counts, kinds=["colour"])
    with pytest.raises(ValueError, match="at least 1"):
        labels.automatic_labels(counts, least=0)


def test_labels_of_concepts_say_nothing_where_concepts_are_not_known():
    z, known, records = planted(0)
    made = labels.automatic_labels(labels.count(Codes(None, z), known))
    bare = row_facts(records)
    got = labels.judge(Codes(None, z), bare, made)
    assert got.f1[0] == got.f1[1] == 1 and np.isnan(got.f1[2])
    assert list(labels.by_kind(*[Codes(None, z)] * 2, (bare, bare))) == [
        "on",
        "after",
        BEST,
    ]
