"""The fast solvers against slow, obvious ones."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls

from saeutils.sparse_coding import SparseCoder, fista, lasso, omp
from saeutils.synthetic import Synthetic, SyntheticConfig


def problem(seed, rows=20, m=24, d=12):
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    return torch.randn(rows, d, generator=generator), W


def violation(x, W, z, penalty):
    """Largest violation of the optimality conditions: the gradient of ½‖x − zW‖² + λ Σz
    is 0 where z > 0 and ≥ 0 elsewhere."""
    gradient = (z @ W - x) @ W.T + penalty
    return torch.where(z > 0, gradient.abs(), (-gradient).relu()).max()


@given(seed=st.integers(0, 10_000), penalty=st.sampled_from([0.05, 0.3, 1.0]))
def test_lasso_satisfies_the_optimality_conditions(seed, penalty):
    x, W = problem(seed)
    W = W * torch.linspace(0.5, 2, len(W))[:, None]  # any lengths
    z = lasso(x, W, penalty).dense(len(W))
    assert (z >= 0).all()
    assert violation(x, W, z, penalty) < 5e-3 * penalty + 1e-4


def test_lasso_and_fista_find_the_same_minimum():
    x, W = problem(1)
    fast, slow = lasso(x, W, 0.2).dense(24), fista(x, W, 0.2, iterations=3000)
    torch.testing.assert_close(fast, slow, atol=2e-3, rtol=0)


def test_fista_in_chunks_is_fista():
    x, W = problem(2, rows=5000)
    alone = fista(x[4000:4010], W, 0.2, iterations=50)
    together = fista(x, W, 0.2, iterations=50)
    torch.testing.assert_close(together[4000:4010], alone, atol=1e-4, rtol=0)


def slow_omp(x, W, k):
    chosen, z = [], np.zeros(len(W))
    for _ in range(k):
        products = W @ (x - z @ W)
        products[chosen] = -np.inf
        if products.max() <= 0:
            break
        chosen.append(int(products.argmax()))
        z[:] = 0
        z[chosen] = nnls(W[chosen].T, x)[0]
    return z


@given(seed=st.integers(0, 10_000), k=st.integers(0, 8))
def test_omp_is_the_textbook_one(seed, k):
    x, W = problem(seed, rows=4)
    z = omp(x, W, k).dense(len(W)).double().numpy()
    for row in range(4):
        expected = slow_omp(x[row].double().numpy(), W.double().numpy(), k)
        assert z[row] == pytest.approx(expected, abs=2e-3)


def test_omp_takes_a_k_for_each_row_and_stops():
    x, W = problem(3)
    ks = torch.arange(20) % 5
    z = omp(x, W, ks).dense(24)
    assert ((z > 0).sum(1) <= ks).all() and (z[ks == 0] == 0).all()
    some = omp(x, W, 24, tolerance=0.3).dense(24)
    left = (x - some @ W).square().sum(1) / x.square().sum(1)
    assert (left <= 0.3 + 1e-4).float().mean() > 0.9
    weak = omp(x, W, 24, stop_at=0.5).dense(24)
    products = ((x - weak @ W) @ W.T).masked_fill(weak > 0, 0)
    assert products.max() <= 0.5 + 1e-4


def test_refit_is_least_squares_on_what_stays():
    x, W = problem(4, m=40, d=20)
    codes = lasso(x, W, 0.3, refit=True, smallest=0.4)
    z = codes.dense(40)
    assert z[z > 0].min() >= 0.4
    for row in range(20):
        support = z[row] > 0
        best = nnls(W[support].T.double().numpy(), x[row].double().numpy())[0]
        assert z[row][support].tolist() == pytest.approx(best, abs=3e-3)


@pytest.mark.parametrize("method", ["lasso", "omp at k"])
def test_recovers_the_codes_of_the_true_dictionary(method):
    truth = Synthetic(SyntheticConfig(n=128, d=64, l0=5))
    x, acts = truth.sample(500)
    coder = SparseCoder(truth.W, truth.b, method)
    counts = (acts > 0).sum(1) if coder.needs_counts else None
    z = coder.encode(x, counts)
    assert ((z > 0) == (acts > 0)).float().mean() > 0.999
    assert (z - acts).abs().mean() < 1e-3
    assert (coder.decode(z) - x).square().sum() < 1e-2 * x.square().sum()


def test_orthonormal_dictionaries_have_closed_forms():
    x = torch.tensor([[3.0, -2.0, 0.5, 1.0]])
    W = torch.eye(4)
    expected = torch.tensor([[2.2, 0, 0, 0.2]])
    for z in (lasso(x, W, 0.8).dense(4), fista(x, W, 0.8)):
        torch.testing.assert_close(z, expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(omp(x, W, 2).dense(4), torch.tensor([[3.0, 0, 0, 1]]))


@pytest.mark.parametrize("penalty", [0, -1, float("nan")])
def test_refuses_a_useless_penalty(penalty):
    x, W = problem(5)
    with pytest.raises(ValueError, match="penalty"):
        lasso(x, W, penalty)


def test_refuses_what_does_not_fit():
    x, W = problem(6)
    with pytest.raises(ValueError, match="columns"):
        omp(x[:, :5], W, 3)
    with pytest.raises(ValueError, match="negative"):
        omp(x, W, -1)
    with pytest.raises(ValueError, match="none of"):
        SparseCoder(W, W[0], "magic")
