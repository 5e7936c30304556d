"""The controls: known answers, and nothing that training alone may reach."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeutils import baselines, metrics, sae


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fvu(control, rows):
    return metrics.scorecard(control, rows, eval_set="test rows").fvu


@given(st.integers(8, 60), st.integers(0, 5), st.integers(0, 999))
def test_pca_equals_the_singular_value_decomposition(n, k, seed):
    rows = normal(n, 5, seed=seed) * torch.tensor([5.0, 3, 2, 1, 0.5]) + 20
    pca = baselines.PCA(rows, k)
    singular = torch.linalg.svdvals(rows.double() - rows.double().mean(0))
    share = singular**2 / (singular**2).sum()
    torch.testing.assert_close(pca.variance_share, share, atol=1e-9, rtol=1e-6)
    assert fvu(pca, rows) == pytest.approx(share[k:].sum().item(), abs=1e-5)
    torch.testing.assert_close(pca.W_dec @ pca.W_dec.T, torch.eye(k))


def test_pca_points_have_the_variance_that_their_shares_promise():
    rows = normal(500, 5) * torch.tensor([5.0, 3, 2, 1, 0.5]) + 20
    points, shares = baselines.pca_points(rows)
    got = points.var(0) / rows.var(0).sum()
    torch.testing.assert_close(got, shares[:2].float())


def test_pca_of_no_component_is_the_mean_predictor():
    rows = normal(40, 3) + 7
    for control in (baselines.PCA(rows, 0), baselines.mean_predictor(rows)):
        assert fvu(control, rows) == pytest.approx(1, abs=1e-9)
        assert control.encode(rows).shape == (40, 0)


def test_neurons_keep_those_that_deviate_most():
    rows = torch.tensor([[0.0, 10, 5], [2, -10, 5]])
    control = baselines.neurons(rows, 1)
    assert control.encode(rows).tolist() == [[0, 10, 0], [0, -10, 0]]
    assert control.decode(control.encode(rows)).tolist() == [[1, 10, 5], [1, -10, 5]]
    raw = baselines.neurons(rows)
    assert torch.equal(raw.encode(rows), rows) and fvu(raw, rows) == 0


def test_untrained_is_where_training_starts_and_rescaling_only_helps():
    rows = normal(300, 10) + 3
    plain = baselines.untrained(rows, 40, 4, seed=5, rescale=False)
    start = sae.initial_params("topk", 40, rows.mean(0), seed=5)
    torch.testing.assert_close(plain.W_dec, start["W_dec"])
    z = plain.encode(rows)
    assert (z >= 0).all() and ((z > 0).sum(1) <= 4).all()
    scaled = baselines.untrained(rows, 40, 4, seed=5)
    assert fvu(scaled, rows) < fvu(plain, rows)
    for factor in (0.9, 1.1):
        other = baselines.untrained(rows, 40, 4, seed=5)
        other.scale *= factor
        assert fvu(scaled, rows) < fvu(other, rows)


@given(st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_encode_equals_the_slow_obvious_one(k, signed, seed):
    W_dec, b_dec, x = normal(6, 4, seed=seed), normal(4, seed=1), normal(7, 4, seed=2)
    control = baselines.Dictionary(W_dec, b_dec, k, signed=signed, scale=0.5)
    for row, z in zip(x, control.encode(x), strict=True):
        a = [(((row - b_dec) @ w) * 0.5).item() for w in W_dec]
        if not signed:
            a = [max(v, 0) for v in a]
        kept = sorted(range(6), key=lambda i: -abs(a[i]))[:k]
        want = [a[i] if i in kept else 0 for i in range(6)]
        assert z.tolist() == pytest.approx(want, abs=1e-5)


def test_controls_are_all_of_them_and_the_mean_is_the_worst():
    rows = normal(200, 6) * torch.tensor([3.0, 2, 1, 1, 1, 1])
    controls = baselines.controls(rows, 20, 4, seed=1)
    scores = {name: fvu(control, rows) for name, control in controls.items()}
    assert list(scores) == ["PCA, 4 components", "4 neurons", "untrained SAE", "mean"]
    assert max(scores, key=scores.get) == "mean"
    assert scores["mean"] == pytest.approx(1, abs=1e-9)
    assert baselines.controls(rows, 20, 9)["PCA, 9 components"].k == 6


def test_bad_k_is_refused():
    rows = normal(10, 3)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=r"k must lie in 0\.\.3"):
            baselines.PCA(rows, k)
        with pytest.raises(ValueError, match=r"k must lie in 0\.\.3"):
            baselines.neurons(rows, k)
    with pytest.raises(ValueError, match=r"GiB.*project the rows first"):
        baselines.PCA(torch.zeros(2, 12_000), 1)
