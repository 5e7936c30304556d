"""Scores between two models, where the answer is known."""

import math

import pytest
import torch

from saeutils.pair_scores import (
    PairScores,
    View,
    correlations,
    hungarian,
    mutual,
    null_scores,
    pair_scores,
    rsa,
    svcca,
)
from saeutils.related import related
from saeutils.synthetic import Synthetic, SyntheticConfig

TRUTH = Synthetic(SyntheticConfig(n=64, d=16, l0=3, frequency="uniform"))
SCORES = PairScores._fields[:-1]
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR)


def views(**options):
    pair = related(TRUTH, **options)
    a, b = pair.sample(6000)
    return View(*a, pair.a.W), View(*b, pair.b.W)


@pytest.fixture(scope="module")
def view():
    return View(*TRUTH.sample(6000), TRUTH.W)


def test_a_model_is_itself(view):
    scores = pair_scores(view, view)
    assert scores.latents == (64, 64)
    assert [getattr(scores, s) for s in SCORES] == pytest.approx([1] * 10, abs=1e-4)


def test_nothing_minds_the_order_of_latents(view):
    order = torch.randperm(64, generator=GENERATOR)
    other = View(view.rows, view.codes[:, order], view.W_dec[order])
    scores = pair_scores(view, other)
    assert [getattr(scores, s) for s in SCORES] == pytest.approx([1] * 10, abs=1e-4)


def test_only_cosines_mind_a_rotation(view):
    turn = torch.linalg.qr(normal(16, 16)).Q
    scores = pair_scores(view, View(view.rows @ turn, view.codes, view.W_dec @ turn))
    blind = [s for s in SCORES if "cosine" not in s]
    assert [getattr(scores, s) for s in blind] == pytest.approx([1] * 8, abs=1e-4)
    assert scores.cosine_ab < 0.8 and scores.cosine_ba < 0.8


def test_unrelated_models_score_as_permuted_rows_do():
    a, b = views(shared=0)
    nulls, score = null_scores(a, b, times=20), pair_scores(a, b)
    for s in SCORES:
        values = torch.tensor([getattr(null, s) for null in nulls])
        assert abs(getattr(score, s) - values.mean()) < 5 * values.std() + 0.01, s
    assert score.mutual > 0.3  # chance is far from 0
    assert score.svcca == pytest.approx(math.sqrt(16 / 6000), abs=0.03)


@pytest.mark.parametrize("shared", [0.25, 0.75])
def test_a_known_share_is_read_by_correlation(shared):
    scores = pair_scores(*views(shared=shared))
    for s in ("mean_max_ab", "mean_max_ba", "hungarian", "svcca"):
        assert getattr(scores, s) == pytest.approx(shared, abs=0.06), s


def test_dead_latents_are_left_out_and_counted(view):
    codes, W = view.codes.clone(), view.W_dec
    codes[:, :4] = 0
    scores = pair_scores(view, View(view.rows, codes, W))
    assert scores.latents == (64, 60)
    assert scores.mean_max_ba == pytest.approx(1, abs=1e-4)
    assert scores.mean_max_ab < 0.97  # four latents of a have no partner
    assert scores.mutual == 1


def test_small_matrices_by_hand():
    c = torch.tensor([[0.9, 0.8], [0.7, 0.1]])
    i, j = hungarian(c)
    assert [*zip(i.tolist(), j.tolist(), strict=True)] == [(0, 1), (1, 0)]
    assert mutual(c) == 0.5  # only (0, 0)
    x = torch.tensor([[1.0, 5], [2, 5], [4, 5]])
    assert correlations(x, -x[:, :1]).flatten().tolist() == pytest.approx([-1, 0])


def test_mutual_neighbours_by_chance():
    values = [mutual(normal(30, 40)) for _ in range(300)]
    assert sum(values) / 300 == pytest.approx(40 / 69, abs=0.02)


def test_correlations_are_numpys():
    x, y = normal(50, 3) + 100, normal(50, 2)
    expected = torch.corrcoef(torch.cat([x, y], 1).T.double())[:3, 3:].float()
    torch.testing.assert_close(correlations(x, y), expected, atol=1e-4, rtol=0)


def test_svcca_has_known_answers_and_refuses_too_few_rows():
    x = normal(4000, 8)
    assert svcca(x, x @ normal(8, 8)) == pytest.approx(1, abs=1e-4)
    half = torch.cat([x[:, :4], normal(4000, 4)], 1)
    assert svcca(x, half) == pytest.approx(0.5 + math.sqrt(4 / 4000) / 2, abs=0.03)
    assert svcca(x, normal(4000, 8)) < 0.06
    with pytest.raises(ValueError, match="more than 16 rows"):
        svcca(normal(16, 8), normal(16, 8))
    few = View(x[:16], x[:16], normal(8, 8))
    assert math.isnan(pair_scores(few, few).svcca)


def test_rsa_sees_distances_alone():
    x = normal(60, 5)
    turned = 3 * x @ torch.linalg.qr(normal(5, 5)).Q + 7
    assert rsa(x, turned) == pytest.approx(1, abs=1e-4)
    assert abs(rsa(x, normal(60, 5))) < 0.2


def test_other_widths_and_rows():
    a, b = views(shared=0.5)
    other = View(b.rows, b.codes, normal(64, 9))
    assert math.isnan(pair_scores(a, other).cosine_ab)
    with pytest.raises(ValueError, match="same inputs"):
        pair_scores(a, View(b.rows[:-1], b.codes[:-1], b.W_dec))
