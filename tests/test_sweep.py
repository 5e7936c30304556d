"""Grids of configurations, and the flags on what they reached."""

from types import SimpleNamespace

import pytest
from test_training import config, sparse_rows

from saeutils.sweep import frontier, grid
from saeutils.training import train_many


def result(d_sae, l0, fvu, architecture="topk"):
    return SimpleNamespace(
        config=SimpleNamespace(architecture=architecture, d_sae=d_sae, seed=0),
        scorecard=SimpleNamespace(l0=l0, fvu=fvu, dead=0.0),
    )


def test_grid_is_every_combination():
    configs = grid(config(), k=[2, 4], seed=[0, 1, 2])
    assert [(c.k, c.seed) for c in configs] == [
        (2, 0), (2, 1), (2, 2), (4, 0), (4, 1), (4, 2)
    ]  # fmt: skip
    assert all(c.d_sae == 64 for c in configs)


def test_grid_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="no 'width'"):
        grid(config(), width=[1])
    with pytest.raises(ValueError, match="no values for k"):
        grid(config(), k=[])
    with pytest.raises(ValueError, match="k must lie in"):
        grid(config(), k=[4, 4000])


def test_flags_on_known_answers():
    table = frontier(
        [
            result(64, 8.0, 0.30),
            result(256, 8.0, 0.20),  # better at the same L0
            result(1024, 8.0, 0.20),  # wider, no better
            result(64, 16.0, 0.25),  # more L0 and worse than run 1
            result(256, 4.0, 0.50),  # the sparsest
            result(2048, 8.0, 0.10, "l1"),  # another architecture is no excuse
        ]
    ).set_index("run")
    assert table.pareto.to_dict() == {
        0: False, 1: False, 2: False, 3: False, 4: True, 5: True
    }  # fmt: skip
    assert table.wider_is_no_better.to_dict() == {
        0: False, 1: False, 2: True, 3: False, 4: False, 5: False
    }  # fmt: skip


def test_frontier_of_real_runs():
    rows = sparse_rows()
    results = train_many(rows, grid(config(steps=150), k=[2, 8]), progress=False)
    table = frontier(results)
    assert table.l0.tolist() == pytest.approx([2, 8], rel=0.05)
    assert table.fvu.is_monotonic_decreasing
    assert table.pareto.all()
