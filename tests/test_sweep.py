"""Grids of configurations, and the flags on what they reached."""

from types import SimpleNamespace

import pytest
import torch
from test_training import config, sparse_rows

from saeutils.sweep import frontier, grid, match_l0, train_all
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


def test_all_by_name_equals_each_alone():
    rows = sparse_rows()
    configs = {"b": config(), "a": config(batch_size=32), 7: config(seed=1)}
    together = train_all(rows, configs, progress=False)
    assert list(together) == ["b", "a", 7]
    for name, result in together.items():
        assert result.config == configs[name]
        alone = train_many(rows, [configs[name]], progress=False)[0]
        assert torch.equal(result.sae.W_dec, alone.sae.W_dec)


def test_l1_is_chosen_so_that_as_many_latents_fire_as_asked_for():
    rows = sparse_rows()
    given = {"l1": config("l1", steps=200), "topk": config()}
    options = dict(coefficients=[0.4, 0.8, 1.6, 3.2, 6.4], progress=False)
    reached = []
    for wanted in (6, 12):
        chosen = match_l0(rows, given, wanted, **options)
        assert chosen["topk"] is given["topk"]
        result = train_all(rows, {"l1": chosen["l1"]}, progress=False)["l1"]
        reached.append(result.history.l0.iloc[-1])
    assert reached == pytest.approx([6, 12], rel=0.15)
    out_of_reach = match_l0(rows, given, 1e-6, **options)["l1"]
    assert out_of_reach.l1_coefficient == pytest.approx(6.4)


@pytest.mark.parametrize("coefficients", [[], [2.0, 1.0], [0.0, 1.0]])
def test_l1_coefficients_that_cannot_be(coefficients):
    with pytest.raises(ValueError, match="positive and rise"):
        match_l0(sparse_rows(), {"l1": config("l1")}, 4, coefficients)
