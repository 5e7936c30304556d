"""Shuffling: exactly once, the same everywhere, and as random as it claims."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2, kstest

from saeutils.order import BufferShuffle, FullShuffle, Permutation, mixing


def p_value(counts, expected):
    """Chi-square test that all cells are equally likely."""
    counts = np.asarray(counts, dtype=float)
    return chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1)


@given(st.integers(1, 5000), st.integers(-(2**70), 2**70), st.integers(0, 9))
def test_every_row_exactly_once(n, seed, epoch):
    rows = Permutation(n, seed, epoch)(np.arange(n))
    assert (np.sort(rows) == np.arange(n)).all()


@pytest.mark.parametrize("n", [2**16, 2**16 + 1, 2**16 - 1])
def test_exactly_once_around_a_power_of_two(n):
    assert len(np.unique(Permutation(n, 0)(np.arange(n)))) == n


@given(st.integers(1, 60), st.data())
def test_any_part_of_the_stream_is_the_same(n, data):
    start = data.draw(st.integers(0, 4 * n))
    stop = data.draw(st.integers(start, 5 * n))
    seed = data.draw(st.integers(0, 5))
    whole = FullShuffle(n, seed)(0, 5 * n)
    assert (FullShuffle(n, seed)(start, stop) == whole[start:stop]).all()
    for epoch in range(5):
        assert set(whole[epoch * n : (epoch + 1) * n]) == set(range(n))


def test_the_order_is_pinned():
    """The order is part of what a seed means: a change here breaks every resume."""
    assert FullShuffle(10, 0)(0, 20).tolist() == [
        *[3, 1, 5, 9, 4, 0, 6, 8, 2, 7],
        *[6, 2, 5, 9, 0, 3, 1, 7, 8, 4],
    ]
    assert FullShuffle(10**9, 7)(10**9 - 3, 10**9 + 3).tolist() == [
        *[356697467, 436567427, 556369850],
        *[90164735, 211177878, 1450664],
    ]


def by_hand(permutation, x):
    """The network in whole numbers of any size, one position at a time."""
    high_base, low_base = permutation._bases
    tables = permutation._tables
    x = 1 - x if permutation._swap and x < 2 else x
    while True:
        high, low = divmod(x, low_base)
        for r, table in enumerate(tables):
            if r % 2 == 0:
                high = (high + int(table[low])) % high_base
            else:
                low = (low + int(table[high])) % low_base
        x = high * low_base + low
        if x < permutation.n:
            return x


@pytest.mark.parametrize("n", [1, 2, 7, 1000, 10**6 + 3, 2**40 - 5, 2**40])
def test_the_fast_network_equals_the_slow_one(n):
    permutation, ends = Permutation(n, 3, 1), [0, 1, n // 2, n - 2, n - 1]
    middle = np.random.default_rng(0).integers(n, size=300).tolist()
    edges = [k * permutation._bases[1] + d for k in range(9) for d in (-1, 0, 1)]
    at = [x for x in ends + middle + edges + [n - e for e in edges] if 0 <= x < n]
    assert permutation(np.array(at)).tolist() == [by_hand(permutation, x) for x in at]


def test_seeds_and_epochs_differ():
    starts = range(0, 4000, 1000)
    orders = [FullShuffle(1000, s)(at, at + 1000) for s in range(4) for at in starts]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.02


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_few_rows_are_equally_frequent(n):
    draws = 25 * math.factorial(n)
    counts = Counter(tuple(Permutation(n, seed)(np.arange(n))) for seed in range(draws))
    cells = [counts[order] for order in itertools.permutations(range(n))]
    assert p_value(cells, 25) > 1e-4


@pytest.mark.parametrize("n", [6, 7, 9, 16, 100])
def test_odd_permutations_are_as_frequent_as_even_ones(n):
    draws, upper = 600, np.triu_indices(n, 1)
    odd = 0
    for seed in range(draws):
        rows = Permutation(n, seed)(np.arange(n))
        odd += (rows[upper[0]] > rows[upper[1]]).sum() % 2
    assert abs(odd - draws / 2) < 4.5 * math.sqrt(draws) / 2


def test_pairs_of_neighbours_are_uniform():
    n, draws = 17, 1500
    rows = np.array([Permutation(n, seed)(np.arange(n)) for seed in range(draws)])
    for a, b in [(0, 1), (n - 2, n - 1), (0, n // 2)]:
        table = np.bincount(rows[:, a] * n + rows[:, b], minlength=n * n)
        cells = table.reshape(n, n)[~np.eye(n, dtype=bool)]
        assert p_value(cells, draws / (n * n - n)) > 1e-4


@pytest.mark.parametrize("n", [1000, 60_000, 2**17])
def test_a_long_order_has_no_structure(n):
    rows = Permutation(n, 3)(np.arange(n)).astype(float)
    # Correlation coefficients of a random order are normal with sd 1/√n.
    for lag in (1, 2, 64, 256):
        assert abs(np.corrcoef(rows[:-lag], rows[lag:])[0, 1]) < 4.5 / math.sqrt(n)
    assert abs(np.corrcoef(rows, np.arange(n))[0, 1]) < 4.5 / math.sqrt(n)
    # Displacement modulo n is uniform; fixed points and kept neighbours are few.
    displacement = (rows - np.arange(n)) % n / n
    assert kstest(displacement, "uniform").pvalue > 1e-4
    assert (displacement == 0).sum() <= 7
    assert (np.abs(np.diff(rows)) == 1).sum() <= 10


def test_a_billion_rows_cost_no_more_memory_than_the_tables():
    order = Permutation(10**9, 1)
    assert sum(table.nbytes for table in order._tables) < 2**22
    rows = order(np.arange(0, 10**9, 99_991))
    assert len(np.unique(rows)) == len(rows)
    assert kstest(rows / 1e9, "uniform").pvalue > 1e-4


@pytest.mark.parametrize("n", [0, -1, 2**49])
def test_impossible_sizes(n):
    with pytest.raises(ValueError, match="permutation of"):
        Permutation(n, 0)


@given(st.integers(1, 60), st.data())
def test_a_buffer_shuffle_visits_each_row_once_and_in_any_parts(n, data):
    block, blocks = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 8))
    seed = data.draw(st.integers(0, 5))
    start = data.draw(st.integers(0, 3 * n))
    stop = data.draw(st.integers(start, 4 * n))
    whole = BufferShuffle(n, seed, block, blocks)(0, 4 * n)
    for epoch in range(4):
        assert set(whole[epoch * n : (epoch + 1) * n]) == set(range(n))
    order = BufferShuffle(n, seed, block, blocks)
    assert (order(start, stop) == whole[start:stop]).all()
    for segment in order.segments(start, stop):
        held = [r for a, b in order.spans(segment.buffer) for r in range(a, b)]
        assert np.array(held)[segment.places].tolist() == segment.rows.tolist()


def test_mixing_tells_an_ordered_from_a_buffered_from_a_full_shuffle():
    n, batch = 2**17, 1024
    documents = np.arange(n) // 128
    in_order = mixing(np.arange(n), documents, batch)
    full = mixing(FullShuffle(n, 0)(0, n), documents, batch)
    buffered = mixing(BufferShuffle(n, 0, 256, 64)(0, n), documents, batch)
    tiny = mixing(BufferShuffle(n, 0, 256, 4)(0, n), documents, batch)
    assert in_order.correlation > 0.99 and in_order.documents == 8
    assert abs(full.correlation) < 4.5 / math.sqrt(n)
    assert full.share == pytest.approx(1, abs=0.01)
    assert abs(buffered.correlation) < 0.05
    assert 8 == tiny.documents < buffered.documents < full.documents
    # 64 blocks hold 128 documents; a batch of 1024 meets nearly all of them.
    assert 120 < buffered.documents <= 128
