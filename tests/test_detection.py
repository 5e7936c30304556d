"""Best units, their scores and nulls: known answers, and a slow obvious search."""

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score, precision_score, recall_score, roc_auc_score

from saeutils import detection
from saeutils.examples import Codes


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def random_case(seed, rows=60, units=5, concepts=3):
    g = np.random.default_rng(seed)
    z = g.exponential(size=(rows, units)) * (g.random((rows, units)) < 0.4)
    member = g.random((rows, concepts)) < (0.05, 0.3, 0.7)
    return torch.from_numpy(z.astype("f4")), member


def slow_best(z, member):
    """Every unit, every threshold of the grid."""
    z = z.numpy().astype(float)
    largest = z.max(0)
    grid = [0.0] + [2.0 ** (-j / 3) for j in range(15, 0, -1)]
    best = -1
    for unit in range(z.shape[1]):
        for share in grid:
            said = z[:, unit] > share * largest[unit]
            f1 = f1_score(member, said, zero_division=0)
            if f1 > best + 1e-12:
                best = f1
    return best


# --- the best unit ------------------------------------------------------------


@settings(max_examples=25)  # the obvious search is slow
@given(st.integers(0, 10_000))
def test_the_best_unit_equals_a_slow_obvious_search(seed):
    """And does not depend on how rows come in chunks."""
    z, member = random_case(seed)
    member[0] = True
    for chunk in (1, 7, 100):
        codes = Codes(None, z, budget=4 * z.shape[1] * chunk)
        found = detection.best_units(codes, member)
        for c in range(member.shape[1]):
            assert found.f1[c] == pytest.approx(slow_best(z, member[:, c]))
            said = z[:, found.unit[c]].numpy() > found.threshold[c]
            assert f1_score(member[:, c], said) == pytest.approx(found.f1[c])


@given(st.integers(0, 10_000))
def test_the_order_of_rows_does_not_matter(seed):
    z, member = random_case(seed)
    order = np.random.default_rng(seed).permutation(len(z))
    results = []
    for index in (np.arange(len(z)), order):
        codes = Codes(None, z[index])
        found = detection.best_units(codes, member[index])
        scores = detection.score(codes, member[index], found)
        results.append(np.concatenate([found, scores]))
    np.testing.assert_allclose(*results)


def test_a_perfect_detector_is_found_with_its_threshold():
    z = torch.tensor([[0.0, 3], [5, 9], [1, 8], [6, 0], [0, 1]])
    member = np.array([[0, 1], [1, 1], [0, 1], [1, 0], [0, 1]], bool)
    found = detection.best_units(Codes(None, z), member)
    assert found.unit.tolist() == [0, 1] and found.f1.tolist() == [1, 1]
    assert 1 <= found.threshold[0] < 5 and found.threshold[1] < 1
    scores = detection.score(Codes(None, z), member, found)
    for part in scores:
        assert part.tolist() == [1, 1]


def test_scores_equal_those_of_sklearn():
    z, member = random_case(1, rows=300)
    found = detection.best_units(Codes(None, z), member)
    fresh, truth = random_case(2, rows=300)
    got = detection.score(Codes(None, fresh), truth, found)
    for c in range(3):
        own, true = fresh[:, found.unit[c]].numpy(), truth[:, c]
        said = own > found.threshold[c]
        assert got.f1[c] == pytest.approx(f1_score(true, said))
        assert got.precision[c] == pytest.approx(precision_score(true, said))
        assert got.recall[c] == pytest.approx(recall_score(true, said))
        assert got.auc[c] == pytest.approx(roc_auc_score(true, own))


def test_a_concept_that_is_not_there_has_no_score():
    z, member = random_case(0)
    member[:, 0] = False
    found = detection.best_units(Codes(None, z), member)
    scores = detection.score(Codes(None, z), member, found)
    assert found.unit[0] == -1 and np.isnan([part[0] for part in scores]).all()
    assert np.isfinite([part[1:] for part in scores]).all()
    member[:, 1] = False  # there where it was chosen, not where it is scored
    assert np.isnan(detection.score(Codes(None, z), member, found).f1[1])


def test_both_signs_of_a_neuron_are_units():
    z = torch.tensor([[-2.0], [1], [-3], [4]])
    signed = detection.Signed(Codes(None, z))
    member = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], bool)
    found = detection.best_units(signed, member)
    assert signed.d_sae == 2 and found.unit.tolist() == [1, 0]
    assert found.f1.tolist() == [1, 1]


def test_a_token_is_a_unit():
    member = np.array([[1], [0], [1], [0]], bool)
    units = detection.Categories(np.array([3, 1, 3, 0]), 5)
    found = detection.best_units(units, member)
    assert (found.unit[0], found.threshold[0], found.f1[0]) == (3, 0, 1)


# --- the null -----------------------------------------------------------------


@given(st.integers(2, 6), st.integers(0, 99))
def test_stories_get_the_labels_of_others_and_none_its_own(n, seed):
    g = np.random.default_rng(seed)
    story = np.repeat(100 + np.arange(n), g.integers(1, 6, n))
    position = np.concatenate([np.arange(k) for k in np.bincount(story - 100)])
    member = (story[:, None] - 100) == np.arange(n)  # who it was
    got = detection.of_other_stories(member, story, position, seed=seed)
    donors = {s: np.unique(got[story == s].argmax(1)) for s in np.unique(story)}
    assert all(len(d) == 1 and d[0] + 100 != s for s, d in donors.items())
    assert sorted(int(d[0]) for d in donors.values()) == list(range(n))
    order = g.permutation(len(story))
    moved = detection.of_other_stories(
        member[order], story[order], position[order], seed=seed
    )
    assert (moved == got[order]).all()


def test_positions_are_kept_by_the_null():
    story, position = np.repeat([0, 1, 2], 4), np.tile(np.arange(1, 5), 3)
    member = (position == 1)[:, None]
    assert (detection.of_other_stories(member, story, position) == member).all()


def test_a_planted_concept_beats_the_null():
    g = np.random.default_rng(0)
    story = np.repeat(np.arange(40), 25)
    position = np.tile(np.arange(25), 40)
    member = g.random((1000, 1)) < 0.1
    noise = g.random((1000, 30)) * (g.random((1000, 30)) < 0.1)
    z = torch.from_numpy(np.hstack([member * 2.0, noise]).astype("f4"))
    half = story < 20

    def f1(truth):
        units = {"z": (Codes(None, z[half]), Codes(None, z[~half]))}
        return detection.compare(units, truth[half], truth[~half], ["planted"])

    assert f1(member).f1[0] == 1 and f1(member).unit[0] == 0
    places = pd.DataFrame({"id": story, "position": position})
    units = {"z": (Codes(None, z[half]), Codes(None, z[~half]))}
    parts = member[half], member[~half], ["planted"]
    both = detection.compare(units, *parts, places=(places[half], places[~half]))
    assert both.name.tolist() == ["z", detection.SHUFFLED]
    null = both.iloc[1]
    assert both.f1[0] == 1 and null.f1 < 0.3
    assert null["f1 where chosen"] > null.f1 - 0.05 and null["rows"] > 0


# --- bad input ----------------------------------------------------------------


def test_bad_input_is_refused(unchecked):
    z, member = random_case(0)
    codes = Codes(None, z)
    with pytest.raises(ValueError, match="60 rows of activations, 59 of labels"):
        detection.best_units(codes, member[1:])
    found = detection.best_units(codes, member)
    with pytest.raises(ValueError, match="each row needs both"):
        detection.score(codes, member[1:], found)
    with pytest.raises(ValueError, match="2 names for 3"):
        detection.compare({"z": (codes, codes)}, member, member, ["a", "b"])
    with pytest.raises(ValueError, match="need two"):
        detection.of_other_stories(member, np.zeros(60), np.arange(60))
    negative = detection.best_units(Codes(None, z), member)
    with pytest.raises(ValueError, match="Signed"):
        detection.score(Codes(None, -z), member, negative)
