"""Lengths, success, damage and directions of steering against known answers."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_interventions import CONTEXT, HOOKS, IDS, D, make_sae, neo  # noqa: F401
from threadpoolctl import threadpool_limits

from saeutils import arms, grammar, steering
from saeutils import interventions as iv
from saeutils.stories import StoryData, stories

HOOK = HOOKS[0]


# --- how far --------------------------------------------------------------


def test_divergence_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    found = steering.divergence(p.log() + 3, q.log() - 1)  # logits, not normalised
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert steering.divergence(p.log(), p.log()).item() == pytest.approx(0, abs=1e-7)


def test_kl_by_length_is_that_of_the_edited_model(neo):  # noqa: F811
    ways = {"one": torch.randn(2, D), "null": torch.randn(1, D)}
    frame = steering.kl_by_length(neo, HOOK, ways, [0.0, 3.0], IDS, batch_size=2)
    assert len(frame) == 6 and set(frame["name"]) == {"one", "null"}
    assert frame[frame["x"] == 0]["y"].abs().max() < 1e-6
    edit = {HOOK: iv.push(ways["one"][1], 3.0)}
    expected = steering.divergence(iv.run(neo, IDS), iv.run(neo, IDS, edit)).mean()
    row = frame.query("name == 'one' and direction == 1 and x == 3").iloc[0]
    assert row["y"] == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kl", [0.01, 0.2, 1.0])
def test_lengths_move_the_model_as_far_as_asked(neo, kl):  # noqa: F811
    ways = {"a": torch.randn(3, D, generator=torch.Generator().manual_seed(1))}
    for start in (0.1, 1.0, 300.0):  # wherever the search begins
        lengths = steering.lengths_for(neo, HOOK, ways, IDS, kl, start=start)
        for direction, length in zip(ways["a"], lengths["a"], strict=True):
            edit = {HOOK: iv.push(direction, length.item())}
            moved = steering.divergence(iv.run(neo, IDS), iv.run(neo, IDS, edit))
            assert moved.mean().item() == pytest.approx(kl, rel=0.031)


def test_a_direction_that_the_model_does_not_heed_is_refused(neo):  # noqa: F811
    flat = {"flat": torch.ones(1, D)}  # the layer norm takes it out
    with pytest.raises(ValueError, match=r"direction 0 of 'flat'.*hardly heeds"):
        steering.lengths_for(neo, "blocks.1.hook_resid_post", flat, IDS, 0.5)
    with pytest.raises(ValueError, match="kl must be positive"):
        steering.lengths_for(neo, HOOK, flat, IDS, 0)


# --- what it wins and costs -----------------------------------------------


def test_wilson_by_hand():
    low, high = steering.wilson(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert steering.wilson(0, 20)[0] == 0 and steering.wilson(20, 20)[1] == 1
    with pytest.raises(ValueError, match="11 hits of 10"):
        steering.wilson(11, 10)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_narrows(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = steering.wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    wide = steering.wilson(4 * hits, 4 * n)
    assert wide[1] - wide[0] < high - low
    for p in (low, high):  # each end is a rate that the share is z errors from
        if 0 < p < 1:
            error = (p * (1 - p) / n) ** 0.5
            assert abs(hits / n - p) == pytest.approx(1.959964 * error, rel=1e-5)


def test_what_is_written_is_charged_by_the_untouched_model(neo):  # noqa: F811
    edits = {HOOK: iv.push(torch.randn(D), 5.0)}
    told = steering.write(neo, IDS, 6, edits, seed=2, batch_size=2)
    assert told.ids.shape == (5, 15) and torch.equal(told.ids[:, :9], IDS)
    log_p = iv.run(neo, told.ids).log_softmax(-1)
    for row in range(5):
        new = told.ids[row, 9:].tolist()
        kept = new.index(0) + 1 if 0 in new else 6
        kept = max(1, kept - 1) if 0 in new else kept
        costs = [-log_p[row, 8 + i, new[i]].item() for i in range(kept)]
        assert told.nats[row] == pytest.approx(np.mean(costs), rel=1e-4)
        words = new[: new.index(0)] if 0 in new else new
        assert told.texts[row] == neo.tokenizer.decode(words)
    plain = steering.write(neo, IDS, 6, seed=2)
    assert not torch.equal(plain.ids, told.ids)


def test_success_counts_whole_words_only():
    words = frozenset({"cat", "didn't"})
    texts = ["a Cat.", "concatenate", "cats", "She didn't", "did", ""]
    assert arms.contains(texts, words).tolist() == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    nats = np.array([1.0, 2, 3, 4, 5, 6])
    told = steering.Continued(torch.zeros(6, 1).long(), texts, nats, np.zeros(6))
    found = steering.success(told, words)
    assert (found["n"], found["hits"]) == (6, 2)
    assert found["nats"] == 3.5 and found["low"] < 1 / 3 < found["high"]


def test_compare_has_a_row_for_each_concept_and_arm(neo):  # noqa: F811
    ways = {"latent": torch.randn(2, D), "random": torch.randn(3, D)}
    lengths = {"latent": torch.tensor([0.0, 50.0]), "random": torch.ones(3)}
    words = {"joy": arms.words_of("joy", n=60), "place": arms.words_of("place", n=60)}
    args = (neo, HOOK, ways, lengths, words, IDS, 5)
    frame = steering.compare(*args)
    assert len(frame) == 6 and (frame["n"] == 5).all()
    frame = frame.set_index(["concept", "arm"])
    nothing, plain = frame.loc[("joy", "latent")], frame.loc[("joy", "none")]
    assert nothing["nats"] == pytest.approx(plain["nats"])  # length 0 is no steering
    assert frame.loc[("place", "latent"), "nats"] > plain["nats"]
    random = frame.xs("random", level="arm")
    assert random["nats"].nunique() == 1  # the same texts for all concepts


def test_intervals_apart():
    frame = pd.DataFrame(
        {
            "concept": ["a", "b"] * 2,
            "arm": ["x", "x", "y", "y"],
            "low": [0.5, 0.1, 0.1, 0.1],
            "high": [0.9, 0.4, 0.4, 0.4],
        }
    )
    assert steering.apart(frame, "x", "y") == ["a"]
    assert steering.apart(frame, "y", "x") == []


# --- before and after -----------------------------------------------------


def test_gains_are_differences_of_log_probabilities(neo):  # noqa: F811
    edits = {HOOK: iv.push(torch.randn(D), 5.0)}
    found = steering.gains(neo, IDS, edits)
    a, b = (iv.run(neo, IDS, e).log_softmax(-1) for e in (edits, {}))
    token = IDS[2, 4]
    expected = (a - b)[2, 3, token].item()
    assert found[2, 4].item() == pytest.approx(expected, abs=1e-4)
    assert found[:, 0].isnan().all() and not found[:, 1:].isnan().any()
    assert steering.gains(neo, IDS, {})[:, 1:].abs().max() == 0


def test_next_tokens_are_the_likeliest_of_the_first_two_versions(neo):  # noqa: F811
    versions = {"plain": {}, "moved": {HOOK: iv.push(torch.randn(D), 9.0)}}
    found = steering.next_token(neo, "Tom was", versions, top=4)
    assert 4 <= len(found.tokens) <= 8
    for name, p in found.probabilities.items():
        assert len(p) == len(found.tokens) and p.sum() <= 1 + 1e-5, name
    moved = found.probabilities["moved"]
    assert torch.equal(moved, moved.sort(descending=True).values)
    texts = steering.told(neo, "Tom was", versions, 5)
    assert texts["plain"][1].nan_to_num().abs().max() == 0  # nothing gained
    for tokens, gain in texts.values():
        assert len(tokens) == len(gain)


def test_moved_compares_with_the_first_version(neo):  # noqa: F811
    sae = make_sae("topk", k=6)
    versions = {"plain": {}, "pushed": {HOOK: iv.steer(sae, {3: 50.0})}}
    found = steering.moved(neo, HOOK, sae, IDS, versions)
    assert found["plain"].kept == 1 > found["pushed"].kept
    step = found["pushed"].acts - found["plain"].acts
    assert torch.allclose(step, 50 * sae.W_dec[3].expand_as(step), atol=1e-4)
    assert found["pushed"].mean[3] > found["plain"].mean[3] + 10
    assert found["plain"].acts.shape == (5 * 8, D)  # all positions but the first


class FakeUMAP:
    """As umap-learn does, it leaves another number of threads behind."""

    def __init__(self, **options):
        assert options["metric"] == "cosine" and options["random_state"] == 3

    def fit_transform(self, rows):
        threadpool_limits(torch.get_num_threads() + 1, user_api="openmp")
        return rows[:, :2]


def test_one_map_leaves_the_threads_alone(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=FakeUMAP))
    rows, threads = torch.randn(60, 8), torch.get_num_threads()
    points = steering.one_map({"a": rows[:20], "b": rows[20:]}, seed=3)
    assert torch.get_num_threads() == threads
    assert np.array_equal(points["a"], rows[:20, :2].numpy())
    assert np.array_equal(points["b"], rows[20:, :2].numpy())


# --- directions -----------------------------------------------------------


def test_words_of_a_concept():
    joy = arms.words_of("joy", n=60)
    assert {"happy", "glad"} <= joy and "sad" not in joy
    assert arms.words_of("female pronoun", n=60) == {"she", "her", "herself"}
    with pytest.raises(ValueError, match="carries 'nonsense'"):
        arms.words_of("nonsense", n=5)


def test_difference_of_means_by_hand():
    rows = torch.randn(50, 7)
    member = np.random.default_rng(0).random((50, 3)) > 0.6
    found = arms.difference_of_means(rows, member)
    for c in range(3):
        where = torch.from_numpy(member[:, c])
        expected = rows[where].mean(0) - rows[~where].mean(0)
        assert torch.allclose(found[c], expected, atol=1e-5)
    with pytest.raises(ValueError, match="concept 0 is on none"):
        arms.difference_of_means(rows, np.zeros((50, 1), bool))
    with pytest.raises(ValueError, match="50 rows of activations, 9"):
        arms.difference_of_means(rows, member[:9])


def test_random_directions_are_unit_and_by_seed():
    a = arms.random_directions(5, 40)
    assert torch.allclose(a.norm(dim=1), torch.ones(5))
    assert torch.equal(a, arms.random_directions(5, 40))
    assert not torch.equal(a, arms.random_directions(5, 40, seed=1))


@pytest.fixture(scope="module")
def data(neo, tmp_path_factory):  # noqa: F811
    made = stories("train", "grammar", n=12)
    root = tmp_path_factory.mktemp("rows")
    concepts = ["noun", "pronoun", "punctuation"]
    parts = made.take(slice(6)), made.take(slice(6, None))
    return concepts, *(
        arms.labelled(neo, HOOK, part, concepts, root / str(i), context=CONTEXT)
        for i, part in enumerate(parts)
    )


def test_labels_are_those_of_the_word_and_of_the_next(data, neo):  # noqa: F811
    concepts, _, score = data
    records = score.store.provenance
    assert set(records["id"]) == set(range(6, 12))  # ids travel with rows
    ids, position = records["id"].to_numpy(), records["position"].to_numpy()
    spans = dict(zip(score.coded.documents.tolist(), score.coded.spans, strict=True))
    for row in range(0, len(records), 7):
        start, stop = spans[ids[row]][position[row]]
        carried = {
            concept
            for word in grammar.story(0, int(ids[row])).words
            if word.start < stop and start < word.stop
            for concept in word.concepts
        }
        assert score.on[row].tolist() == [c in carried for c in concepts]
        if row + 1 < len(records) and ids[row + 1] == ids[row]:
            assert np.array_equal(score.before[row], score.on[row + 1])
    last = np.flatnonzero(np.diff(ids))
    assert not score.before[last].any()  # what comes after a story is no word of it


def test_latents_are_chosen_on_some_stories_and_scored_on_others(data, neo):  # noqa: F811
    concepts, choose, score = data
    sae = make_sae("l1")
    chosen = arms.latents_by_rule(sae, choose, score, concepts)
    assert list(chosen["rule"]) == ["on"] * 3 + ["before"] * 3
    assert chosen["F1"].between(0, 1).all() and chosen["latent"].between(0, 59).all()
    costs = arms.ablation_costs(neo, HOOK, sae, chosen, score, n_stories=4)
    assert np.isfinite(costs[["Δ its words", "Δ other words"]]).all(axis=None)
    ways = arms.directions(sae, chosen, choose, 4)
    assert [len(d) for d in ways.values()] == [3, 3, 3, 3, 4]
    latent = chosen["latent"][1]
    assert torch.equal(ways["latent (on)"][1], sae.W_dec[latent])


def test_an_ablation_of_what_never_fires_costs_nothing(data, neo):  # noqa: F811
    concepts, _, score = data
    sae = make_sae("l1")
    sae.b_enc.data[7] = -1e6
    chosen = pd.DataFrame({"concept": concepts[:1], "rule": ["on"], "latent": [7]})
    costs = arms.ablation_costs(neo, HOOK, sae, chosen, score)
    assert costs.loc[0, ["Δ its words", "Δ other words"]].abs().max() == 0


def test_several_corpora_are_numbered_anew(neo, tmp_path):  # noqa: F811
    made = stories("train", "grammar", n=3)
    store = arms.saved(neo, HOOK, [made, made.take([0, 2])], tmp_path, context=CONTEXT)
    assert sorted(set(store.provenance["id"])) == [0, 1, 2, 3, 4]


def test_beginnings_are_distinct_and_long_enough(neo):  # noqa: F811
    texts = ["Tom saw a cat and a dog", "Tom saw a cat and a bird", "Tom"]
    found = arms.beginnings(neo, StoryData(texts, np.arange(3), "train", "own"), 4)
    assert found.shape == (1, 4)  # both begin alike
    with pytest.raises(ValueError, match="more than 30 tokens"):
        arms.beginnings(neo, StoryData(["Tom"], np.arange(1), "train", "own"), 30)


def test_unknown_concepts_are_refused_before_anything_is_saved(neo, tmp_path):  # noqa: F811
    made = stories("train", "grammar", n=2)
    with pytest.raises(ValueError, match="no such concept"):
        arms.labelled(neo, HOOK, made, ["bliss"], tmp_path / "x")
    assert not (tmp_path / "x").exists()
