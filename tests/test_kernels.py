"""The numba bodies against the plain torch ones, and both against known answers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeutils import kernels
from saeutils.kernels import Codes, Weights


@pytest.fixture(params=["numba", "torch"])
def body(request, monkeypatch):
    monkeypatch.setattr(kernels, "_REFERENCE", request.param == "torch")
    return request.param


def matrix(seed: int, *shape: int, levels: int = 0) -> torch.Tensor:
    """Gaussian numbers; with `levels`, rounded to few values so that ties abound."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return (x * levels).round() / levels if levels else x


def test_topk_keeps_the_largest_positive_entries(body):
    pre = torch.tensor([[3.0, -1, 5, 4], [-1, -2, 0, -3], [1, 1, 1, 1]])
    codes = kernels.select_topk([(0, pre)], 2)
    assert codes.indptr.tolist() == [0, 2, 2, 4]
    assert codes.dense(4)[0].tolist() == [0, 0, 5, 4]
    assert codes.values[2:].tolist() == [1, 1]
    assert len(set(codes.indices[2:].tolist())) == 2


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 20),
    d=st.integers(1, 200),
    k=st.integers(1, 40),
    levels=st.sampled_from([0, 1, 3]),
    positive=st.booleans(),
    shift=st.sampled_from([0.0, -3.0, 3.0]),
)
def test_topk_takes_the_same_values_as_a_sort(seed, n, d, k, levels, positive, shift):
    pre = matrix(seed, n, d, levels=levels) + shift
    codes = kernels.select_topk([(0, pre)], k, positive)
    for i in range(n):
        part = slice(int(codes.indptr[i]), int(codes.indptr[i + 1]))
        columns, values = codes.indices[part].long(), codes.values[part]
        assert len(set(columns.tolist())) == len(columns)
        assert torch.equal(pre[i, columns], values)
        expected = pre[i].sort(descending=True).values[:k]
        if positive:
            expected = expected[expected > 0]
        assert torch.equal(values.sort(descending=True).values, expected)


@given(seed=st.integers(0, 2**16), n=st.integers(1, 9), d=st.integers(1, 90))
def test_above_keeps_exactly_what_is_above_its_latents_threshold(seed, n, d):
    pre, threshold = matrix(seed, n, d, levels=2), matrix(seed + 1, d, levels=2)
    codes = kernels.select_above([(0, pre)], threshold)
    assert torch.equal(codes.dense(d), torch.where(pre > threshold, pre, 0))
    assert len(codes.values) == int((pre > threshold).sum())


@given(
    seed=st.integers(0, 2**16),
    n=st.integers(1, 12),
    d=st.integers(1, 60),
    share=st.floats(0.01, 1),
    guess=st.sampled_from([0.0, 0.5, 2.0, 100.0]),
)
def test_batch_topk_is_exact_whatever_the_guess(seed, n, d, share, guess):
    pre = matrix(seed, n, d)
    total = max(1, int(share * n * d))
    codes, cut = kernels.select_batch_topk(lambda: [(0, pre)], total, guess)
    positive = pre[pre > 0].sort(descending=True).values
    expected = positive[:total]
    assert torch.equal(codes.values.sort(descending=True).values, expected)
    assert cut == (float(expected[-1]) if len(expected) else 0.0)


def test_batch_topk_of_a_batch_without_positive_entries_is_empty(body):
    codes, cut = kernels.select_batch_topk(lambda: [(0, -torch.ones(3, 4))], 5, 0.7)
    assert len(codes.values) == 0 and cut == 0.0
    assert codes.indptr.tolist() == [0, 0, 0, 0]


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 40),
    d_in=st.integers(1, 20),
    d_sae=st.integers(3, 50),
    nested=st.booleans(),
)
def test_numba_equals_torch_in_forward_and_backward(seed, batch, d_in, d_sae, nested):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(batch, d_sae, generator=generator).double() - 1
    codes = kernels.select_above([(0, z)], 0.0)
    weights = Weights(
        *(
            matrix(seed + i, *shape).double()
            for i, shape in enumerate([(d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,)])
        )
    )
    x = matrix(seed + 9, batch, d_in).double()
    widths = (1, 2, d_sae) if nested else ()
    results = []
    for reference in (False, True):
        kernels._REFERENCE = reference
        try:
            forward = kernels.reconstruct(
                codes, weights.W_dec, weights.b_dec, x, widths
            )
            grads = kernels.gradients(
                codes,
                forward.dot,
                forward.residual,
                0.3,
                x - weights.b_dec,
                weights,
                widths,
            )
        finally:
            kernels._REFERENCE = False
        results.append([*forward, *grads])
    for fast, slow in zip(*results, strict=True):
        assert torch.allclose(fast, slow, rtol=1e-9, atol=1e-9)
    outer = codes.dense(d_sae) @ weights.W_dec + weights.b_dec - x
    assert torch.allclose(results[0][0][-1], outer, atol=1e-9)


def test_encoding_in_chunks_equals_encoding_at_once(monkeypatch):
    x, W, b = matrix(0, 500, 8), matrix(1, 30, 8), matrix(2, 30)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 100)
    chunks = [(start, pre.clone()) for start, pre in kernels.encode_chunks(x, W, b)]
    assert [start for start, _ in chunks] == [*range(0, 500, 64)]
    assert torch.allclose(torch.cat([p for _, p in chunks]), x @ W.T + b, atol=1e-5)


def test_bfloat16_encoding_is_close_and_keeps_the_dtype():
    x, W, b = matrix(0, 100, 64), matrix(1, 50, 64), matrix(2, 50)
    ((_, exact),) = kernels.encode_chunks(x, W, b)
    exact = exact.clone()
    ((_, low),) = kernels.encode_chunks(x, W, b, low_precision=True)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).norm() / exact.norm() < 0.01


def test_rows_of_codes():
    codes = Codes(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 0, 1]), torch.ones(3))
    assert codes.rows.tolist() == [0, 0, 2]


def test_threads_give_the_same_as_one(monkeypatch):
    pre = matrix(3, 700, 60)
    one = kernels.select_topk([(0, pre)], 5)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    three = kernels.select_topk([(0, pre)], 5)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))
