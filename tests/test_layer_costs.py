"""Costs of layers alone and together, against edits made by hand."""

import pandas as pd
import pytest
import torch

from saeutils import baselines
from saeutils.layer_costs import TOGETHER, cost_table, layer_costs
from saeutils.models import MLP, evaluate
from saeutils.splicing import edited


@pytest.fixture(scope="module")
def case():
    x = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    model = MLP((8, 5), d_in=6, n_classes=3, seed=1)
    return model, (x, model(x).argmax(1))


def test_each_alone_and_both_at_once(case):
    model, data = case
    zero = {
        f"layer {i}": (
            f"fc{i}",
            baselines.Dictionary(torch.zeros(0, d), torch.zeros(d)),
        )
        for i, d in ((1, 8), (2, 5))
    }
    same = {
        f"layer {i}": (f"fc{i}", baselines.Dictionary(torch.eye(d), torch.zeros(d)))
        for i, d in ((1, 8), (2, 5))
    }
    got = layer_costs(model, {"zero": zero, "same": same}, data, batch_size=70)
    assert got.layer.tolist() == ["layer 1", "layer 2", TOGETHER] * 2
    clean = evaluate(model, data).cross_entropy
    assert got.clean.tolist() == pytest.approx([clean] * 6)
    for place, hooks in enumerate((["fc1"], ["fc2"], ["fc1", "fc2"])):
        with (
            edited(model, hooks[0], torch.zeros_like),
            edited(model, hooks[-1], torch.zeros_like),
        ):
            want = evaluate(model, data).cross_entropy - clean
        assert got.cost[place] == pytest.approx(want, abs=1e-6)
    assert got["sum"][0] == pytest.approx(got.cost[0] + got.cost[1])
    assert got.cost[3:].abs().max() < 1e-6 and got.kl[3:].abs().max() < 1e-6
    assert (got.kl[:3] > 0).all()


def test_a_single_layer_is_not_summed_with_itself(case):
    model, data = case
    mean = baselines.mean_predictor(model.fc1(data[0]).detach())
    got = layer_costs(model, {"mean": {"first": ("fc1", mean)}}, data)
    assert got.layer.tolist() == ["first"] and got["sum"][0] == got.cost[0]


def test_names_must_have_the_same_layers(case):
    model, data = case
    sae = baselines.Dictionary(torch.eye(8), torch.zeros(8))
    for wrong in ({}, {"a": {}}, {"a": {"x": ("fc1", sae)}, "b": {"y": ("fc1", sae)}}):
        with pytest.raises(ValueError, match="the same layers for every name"):
            layer_costs(model, wrong, data)
    with pytest.raises(ValueError, match="no hook point 'fc9'"):
        layer_costs(model, {"a": {"x": ("fc9", sae)}}, data)


def test_the_table_divides_by_what_it_names():
    lines = [("half", "x", 1.0, 0.5, 2.0), ("none", "x", 2.0, 0.9, 2.0)]
    lines += [("half", TOGETHER, 4.0, 1.5, 2.0), ("none", TOGETHER, 5.0, 2.5, 2.0)]
    costs = pd.DataFrame(lines, columns=["name", "layer", "cost", "kl", "clean"])
    got = cost_table(costs, "none").set_index("name")
    assert got["recovered, x"].tolist() == [0.5, 0]
    assert got[f"recovered, {TOGETHER}"].tolist() == pytest.approx([0.2, 0])
    assert got.loc["half"].tolist()[:2] == [1.0, 0.5]
    with pytest.raises(ValueError, match="no replacement is called 'zero'"):
        cost_table(costs, "zero")
