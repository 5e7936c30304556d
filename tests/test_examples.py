"""Top examples against a slow obvious search; class profiles with known answers."""

import math

import jaxtyping
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeutils.baselines import Dictionary
from saeutils.examples import Codes, class_profile, top_examples
from saeutils.store import TensorStore


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def sparse(n, d, seed, levels=4):
    """Few levels, so that there are many ties and many zeros; some negative."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, levels, (n, d), generator=g).float().clamp(min=-1)


# --- top examples -------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
def test_top_examples_equal_the_slow_obvious_ones(rows, items, n, seed):
    """Any chunk size, repeated ids, ties."""
    z = sparse(rows, 3, seed)
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 100 + items * 8, (rows,), generator=g)
    for chunk in (1, 7, 1000):
        top = top_examples(Codes(None, z, ids=ids, budget=4 * 3 * chunk), n)
        for latent in range(3):
            best = {}
            for row in range(rows):
                value, item = z[row, latent].item(), ids[row].item()
                if value > 0 and value > best.get(item, (0, 0))[0]:
                    best[item] = value, row
            want = sorted(best.items(), key=lambda b: (-b[1][0], b[1][1]))[:n]
            got = top[latent]
            assert got.latent == latent
            assert got.ids.tolist() == [item for item, _ in want]
            assert got.values.tolist() == [value for _, (value, _) in want]
            assert got.rows.tolist() == [row for _, (_, row) in want]


def test_a_latent_with_few_firings_is_not_filled_up():
    z = torch.zeros(30, 3)
    z[7, 1], z[4, 1], z[9, 2] = 2.0, 5.0, -1.0
    top = top_examples(Codes(None, z), n=10)
    assert top[1].ids.tolist() == [4, 7]
    assert top[0].ids.tolist() == top[2].ids.tolist() == []
    assert [len(e.ids) for e in top] == [0, 2, 0] and len(top) == 3


def test_an_image_never_repeats():
    """Four rows an image (patches): the grid shows images, at their best patch."""
    z = torch.tensor([[1.0], [9], [8], [7], [3], [0], [4], [0]])
    ids = torch.tensor([5, 5, 5, 5, 6, 6, 6, 6])
    got = top_examples(Codes(None, z, ids=ids), n=5)[0]
    assert (got.ids.tolist(), got.values.tolist()) == ([5, 6], [9, 4])
    assert got.rows.tolist() == [1, 6]


def test_ids_and_labels_come_with_the_rows_and_survive_encoding():
    rows = torch.tensor([[1.0, 0], [5, 2], [3, 9]])
    provenance = pd.DataFrame({"id": [70, 50, 60], "label": [0, 1, 2]})
    sae = Dictionary(torch.eye(2), torch.zeros(2), signed=False)
    codes = Codes(sae, TensorStore(rows, provenance))
    top = top_examples(codes, 2)
    assert top[0].ids.tolist() == [50, 60] and top[0].labels.tolist() == [1, 2]
    assert top[1].ids.tolist() == [60, 50] and top[1].labels.tolist() == [2, 1]
    assert top_examples(Codes(sae, rows), 1)[1].labels is None


def test_only_the_latents_asked_for():
    top = top_examples(Codes(None, torch.ones(4, 3)), 2, latents=[2])
    assert [len(e.ids) for e in top] == [0, 0, 2]


def test_an_iterator_is_not_used_up():
    codes = Codes(None, torch.ones(4, 3), budget=24)
    assert [f.row.tolist() for f in codes] == [f.row.tolist() for f in codes]


# --- class profiles -----------------------------------------------------------


def test_class_profile_known_answers():
    labels = torch.tensor([3, 3, 8, 8, 8, 8])
    z = torch.tensor(
        # one class, evenly spread, 3 : 1, dead, negative counts by size
        [
            [2.0, 1, 3, 0, -1],
            [4, 1, 3, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 1, 1, 0, 0],
            [0, 1, 1, 0, -2],
        ]
    )
    for chunk in (1, 4, 100):
        got = class_profile(Codes(None, z, labels=labels, budget=4 * 5 * chunk))
        assert got.classes.tolist() == [3, 8]
        assert got.mean.tolist() == [[3, 0], [1, 1], [3, 1], [0, 0], [0.5, 0.5]]
        assert got.share.tolist() == [[1, 0], [1, 1], [1, 1], [0, 0], [0.5, 0.25]]
        assert got.rate.tolist() == [0.5, 1, 1, 0, 0.375]
        assert got.firing_counts.tolist() == [2, 6, 6, 0, 2]
        assert got.live.tolist() == [True, True, True, False, True]
        assert got.top_class.tolist() == [3, 3, 3, -1, 3]
        h = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
        assert got.entropy.tolist() == pytest.approx(
            [0, 1, h, math.nan, 1], nan_ok=True
        )
        assert got.selectivity.tolist() == pytest.approx(
            [1, 0, 0.5, math.nan, 0], nan_ok=True
        )


@given(st.integers(2, 10), st.integers(0, 99))
def test_entropy_and_selectivity_stay_in_their_ranges(classes, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(4)
    z = torch.rand(len(labels), 6, generator=g) * (
        torch.rand(len(labels), 6, generator=g) < 0.3
    )
    got = class_profile(Codes(None, z, labels=labels))
    entropy, selectivity = got.entropy[got.live], got.selectivity[got.live]
    assert ((entropy >= 0) & (entropy <= math.log2(classes) + 1e-9)).all()
    assert ((selectivity >= 0) & (selectivity <= 1)).all()


def test_shuffled_labels_make_a_selective_latent_unselective():
    labels = torch.arange(10).repeat(200)
    z = (labels[:, None] == torch.arange(10)).float()
    g = torch.Generator().manual_seed(0)
    shuffled = labels[torch.randperm(2000, generator=g)]
    codes = Codes(None, z, labels=labels)
    assert class_profile(codes).entropy.max() == 0
    assert class_profile(codes, shuffled).entropy.min() > 3


# --- bad input ----------------------------------------------------------------


def test_bad_input_is_refused(unchecked):
    z = torch.ones(4, 3)
    with pytest.raises(ValueError, match="3 ids for 4 rows"):
        Codes(None, z, ids=torch.arange(3))
    with pytest.raises(ValueError, match="5 labels for 4 rows"):
        Codes(None, z, labels=torch.arange(5))
    codes = Codes(None, z)
    with pytest.raises(ValueError, match="n must be at least 1"):
        top_examples(codes, 0)
    with pytest.raises(ValueError, match=r"latents must lie in 0\.\.2"):
        top_examples(codes, latents=[3])
    with pytest.raises(IndexError, match="latent 3"):
        top_examples(codes)[3]
    with pytest.raises(ValueError, match="carry no labels"):
        class_profile(codes)
    with pytest.raises(ValueError, match="2 labels for 4 rows"):
        class_profile(codes, torch.arange(2))
    with pytest.raises(ValueError, match="two classes or more"):
        class_profile(codes, torch.zeros(4, dtype=torch.int64))
    z[2, 0] = math.nan
    with pytest.raises(ValueError, match="row 2 contains NaN"):
        top_examples(codes)
