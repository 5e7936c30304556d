"""Scores of latents: known answers on latents made by hand."""

import pytest
import torch

from saeutils import baselines
from saeutils.datasets import ImageData
from saeutils.models import MLP, activations_at
from saeutils.usefulness import (
    BETTER,
    firing_unit,
    input_gradients,
    usefulness,
)


def test_the_unit_drawn_fires_and_silent_rows_are_left_out():
    z = torch.zeros(50, 5)
    z[1:, 3], z[1::2, 1] = 1.0, -1.0
    unit, rows = firing_unit(z)
    assert rows.tolist() == list(range(1, 50))
    assert (z[rows, unit] != 0).all() and set(unit.tolist()) == {1, 3}


def test_gradients_equal_finite_differences():
    model = MLP((6, 4)).double()
    sae = baselines.Dictionary(torch.randn(9, 6).double(), torch.zeros(6).double())
    x = torch.rand(3, 784).double()
    unit = torch.tensor([0, 8, 4])
    gradient = input_gradients(model, "fc1", sae, x, unit)
    for pixel in (100, 400):
        bump = torch.zeros(784).double()
        bump[pixel] = 1e-6
        up, down = (
            sae.encode(model.fc1(x + sign * bump))[range(3), unit] for sign in (1, -1)
        )
        torch.testing.assert_close(gradient[:, pixel], (up - down).detach() / 2e-6)


def test_the_row_of_a_perfect_control():
    """Neurons untouched: nothing lost, and everything of the untrained net's junk."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(256, (80, 28, 28), generator=g, dtype=torch.uint8)
    x[:, :, :7] = 0
    data = ImageData(x, torch.arange(80) % 4, torch.arange(80), "train", "noise")
    model = MLP((16, 8), n_classes=4)
    junk = torch.zeros(28, 28, dtype=torch.bool)
    junk[:, :7] = True
    control = baselines.neurons(activations_at(model, "fc1", data))
    row = usefulness(
        control, model, "fc1", data, data, junk.flatten(), name="neurons", k=4
    )
    assert row["FVU"] < 1e-9 and row["Δ accuracy (points)"] == 0
    assert row["FVU of PCA"] > 0.1
    # weights are drawn alike for all pixels, so the share is that of the area
    assert row["junk share %"] == pytest.approx(25, abs=2)
    assert set(BETTER) < set(row) and row["name"] == "neurons"


def test_latents_that_know_the_classes_score_full_marks():
    """Four units that copy a bright corner pixel each, and fire on one class alone."""
    labels = torch.arange(120) % 4
    x = torch.zeros(120, 28, 28, dtype=torch.uint8)
    x[torch.arange(120), 0, labels] = 200
    data = ImageData(x, labels, torch.arange(120), "train", "corners")
    model = MLP((4,), n_classes=4)
    with torch.no_grad():
        model.fc1.linear.weight.zero_()[:, :4] = torch.eye(4)
        model.head.weight.copy_(torch.eye(4))
    junk = torch.ones(784, dtype=torch.bool)
    junk[:4] = False
    control = baselines.neurons(activations_at(model, "fc1", data))
    row = usefulness(control, model, "fc1", data, data, junk, name="copies", k=2)
    assert row["accuracy %"] == 100 and row["1-sparse probe %"] == 100
    assert row["NMI"] == pytest.approx(1) and row["junk share %"] == 0
    assert row["L0"] == 1 and row["dead %"] == 0
