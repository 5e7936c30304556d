"""Recovery on answers that are known, and against scikit-learn and sae_lens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeutils import recovery as R
from saeutils.baselines import Dictionary
from saeutils.firing_scores import sparse_auc
from saeutils.sparse_coding import SparseCoder
from saeutils.synthetic import Synthetic, SyntheticConfig

TRUTH = Synthetic(SyntheticConfig(n=96, d=64, l0=4))


class Fixed:
    """Codes that are read off the truth, for known answers."""

    def __init__(self, W, code):
        self.W_dec, self.code = W, code
        self.b_dec = TRUTH.b

    def encode(self, x):
        # d < n, but the rows determine the acts: look them up by sparse inference.
        z = SparseCoder(TRUTH.W, TRUTH.b).encode(x)
        return self.code(z)

    def decode(self, z):
        return z @ self.W_dec + self.b_dec


def test_the_truth_itself_is_found():
    found = R.recovery(SparseCoder(TRUTH.W, TRUTH.b, "omp at k"), TRUTH, rows=3000)
    assert found.share() == found.share(0.95, weighted=True) == 1
    assert found.mmcs == pytest.approx(1) and found.mcc == pytest.approx(1)
    assert found.corrected.mean().item() == pytest.approx(1, abs=1e-5)
    assert found.row()["beats another"] == 1
    assert found.match.tolist() == list(range(96)) and found.uniqueness == 1
    assert found.f1.mean() > 0.99 and found.auc.mean() > 0.99
    assert found.l0 == pytest.approx(found.l0_true, rel=0.05)
    assert found.shrinkage == pytest.approx(1, abs=0.01) and found.r2 > 0.99
    assert found.by_quartile() == [1, 1, 1, 1]


def test_half_the_features_and_duplicates():
    """48 features twice: the copies find nothing new."""
    half = torch.cat([TRUTH.W[:48], TRUTH.W[:48]])
    found = R.recovery(half, TRUTH)
    assert found.share() == pytest.approx(0.5) and found.uniqueness == 0.5
    assert found.mmcs_latents == pytest.approx(1)
    assert found.share(weighted=True) == pytest.approx(
        (TRUTH.rates[:48].sum() / TRUTH.rates.sum()).item(), abs=1e-5
    )
    assert found.by_quartile() == [0, 0, 1, 1]  # features are in order of rate
    assert found.precision is None and "F1" not in found.row()
    narrow = R.recovery(TRUTH.W[:10], TRUTH)
    assert (narrow.match == -1).sum() == 86
    assert narrow.cosine.sum().item() == pytest.approx(10, abs=1e-4)


def test_signs():
    """Latents that point the other way do not count; with codes of both signs they
    do."""
    found = R.recovery(-TRUTH.W, TRUTH)
    assert found.share() == 0 and found.mcc == pytest.approx(1)
    both = R.recovery(Dictionary(-TRUTH.W, TRUTH.b), TRUTH, rows=500)
    assert both.share() == 1


def test_one_latent_does_not_serve_two_features():
    """Two features 26° apart, and one latent between them."""
    truth = Synthetic(SyntheticConfig(n=2, d=2, l0=0.2))
    truth.W = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0.23], [1, -0.23]]), dim=1
    )
    found = R.recovery(torch.tensor([[1.0, 0]]), truth)
    assert found.mmcs > 0.97 and found.share() == 0.5
    # and what beats neither's nearest other feature is marked
    wrong = R.recovery(truth.W[[0]], truth)
    assert wrong.corrected[0] == pytest.approx(1, abs=1e-4) and wrong.corrected[1] < 0


def test_firing_scores_have_known_answers():
    missed = R.recovery(
        Fixed(TRUTH.W, lambda z: z * (torch.arange(len(z)) % 2)[:, None]),
        TRUTH,
        rows=4000,
    )
    assert missed.precision.mean() > 0.99
    assert missed.recall.mean().item() == pytest.approx(0.5, abs=0.03)
    assert missed.auc.mean().item() == pytest.approx(0.75, abs=0.02)
    always = R.recovery(Fixed(TRUTH.W, lambda z: z + 1), TRUTH, rows=2000)
    torch.testing.assert_close(
        always.precision, (TRUTH.sample(2000, seed=777).acts > 0).float().mean(0)
    )
    assert always.recall.min() == 1 and always.auc.mean() > 0.99
    assert always.l0 == 96
    shrunk = R.recovery(Fixed(2 * TRUTH.W, lambda z: z / 4), TRUTH, rows=2000)
    assert shrunk.shrinkage == pytest.approx(0.5, abs=0.01)
    silent = R.recovery(Fixed(TRUTH.W, torch.zeros_like), TRUTH, rows=2000)
    assert silent.dead == 1 and silent.f1.max() == 0
    assert silent.auc.mean().item() == pytest.approx(0.5)


@given(seed=st.integers(0, 1000), levels=st.sampled_from([2, 3, 1000]))
def test_auc_is_scikit_learns(seed, levels):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(seed)
    score = rng.integers(0, levels, (60, 5)) * (rng.random((60, 5)) < 0.5)
    positive = rng.random((60, 5)) < 0.3
    positive[0], positive[1] = True, False
    row, feature = np.nonzero((score > 0) | positive)
    got = sparse_auc(
        feature, score[row, feature], positive[row, feature], positive.sum(0), 60
    )
    expected = [roc_auc_score(positive[:, f], score[:, f]) for f in range(5)]
    assert got == pytest.approx(expected)


def test_agrees_with_sae_lens():
    """Same definition, same number: MCC, uniqueness, F1 of latents."""
    from sae_lens.synthetic.evals import (
        compute_classification_metrics,
        feature_uniqueness,
        mean_correlation_coefficient,
    )

    generator = torch.Generator().manual_seed(0)
    W = TRUTH.W[:80] + 0.1 * torch.randn(80, 64, generator=generator)
    sae = Dictionary(W, TRUTH.b, 4, signed=False)
    ours = R.recovery(sae, TRUTH, rows=2000)
    x, acts = TRUTH.sample(2000, seed=777)
    theirs = compute_classification_metrics(sae.encode(x), acts, W, TRUTH.W)
    assert ours.mcc == pytest.approx(mean_correlation_coefficient(W, TRUTH.W), abs=1e-5)
    assert ours.uniqueness == pytest.approx(feature_uniqueness(W, TRUTH.W))
    assert ours.f1_latents == pytest.approx(theirs.f1_score, abs=1e-5)


def test_a_table_holds_oracles_and_a_null():
    frame = R.table({"half": TRUTH.W[:48]}, TRUTH, rows=1000).set_index("name")
    assert frame["F1"]["oracle: OMP at the true k"] > 0.99
    assert frame["found > 0.9"]["random dictionary"] == 0
    assert frame["MMCS"]["random dictionary"] > 0.2  # the null is not zero
    assert frame["found > 0.9"]["half"] == 0.5


def test_parents_whole_absorbed_and_merged():
    shape = dict(n=64, d=64, l0=3, frequency="uniform", geometry="orthogonal")
    truth = Synthetic(
        SyntheticConfig(**shape, firing="hierarchy", group=3, largest=0.5)
    )
    child = truth.law.parent >= 0
    whole = R.parents(SparseCoder(truth.W, truth.b, "omp at k"), truth)
    assert whole == pytest.approx((1, 0, 0, 1, 1), abs=1e-3)
    W = truth.W.clone()
    W[child] = R.unit(W[child] + W[truth.law.parent[child]])
    absorbed = R.parents(SparseCoder(W, truth.b, penalty=0.1), truth)
    assert absorbed.alone > 0.99 and absorbed.with_child < 0.6
    W = truth.W[~child].clone()
    W.index_add_(0, truth.law.parent[child], truth.W[child])
    merged = R.parents(SparseCoder(R.unit(W), truth.b, penalty=0.1), truth)
    assert merged.cosine == pytest.approx(0.5, abs=1e-3)
    assert merged.children == pytest.approx(0.5, abs=1e-3)
    assert abs(merged.other_children) < 0.01
    with pytest.raises(ValueError, match="no parents"):
        R.parents(SparseCoder(TRUTH.W, TRUTH.b), TRUTH)


def test_refuses_another_width():
    with pytest.raises(ValueError, match="d = 64"):
        R.recovery(torch.randn(5, 7), TRUTH)


@pytest.mark.parametrize("seed", [0, 1])
def test_no_start_value_is_the_truth(seed):
    """One seed for the truth and for an SAE: the SAE must not start at the truth."""
    from saeutils.sae import initial_params

    truth = Synthetic(SyntheticConfig(n=256, d=64, l0=8, seed=seed))
    start = initial_params("topk", 256, torch.zeros(64), seed=seed)["W_dec"]
    for W in (start, R.random_dictionary(truth, 256, seed=seed).W_dec):
        assert R.recovery(W, truth).cosine.max() < 0.7
