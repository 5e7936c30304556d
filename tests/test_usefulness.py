"""Scores of latents: known answers on latents made by hand."""

import pytest
import torch

from saeutils import baselines
from saeutils.datasets import ImageData
from saeutils.models import MLP, activations_at
from saeutils.usefulness import (
    BETTER,
    balanced_accuracy,
    cluster_nmi,
    firing_unit,
    input_gradients,
    one_sparse_probe,
    usefulness,
)


def test_a_latent_that_fires_on_one_class_only_is_a_perfect_probe():
    labels = torch.arange(300) % 3
    z = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    z[:, 2] = (labels == 0).float() * 2
    z[:, 4] = (labels != 1).float() * 3  # silent where the class is
    scores = one_sparse_probe(z[:200], labels[:200], z[200:], labels[200:])
    assert scores[0] == 1 and scores[1] == 1


def test_noise_is_no_probe_and_balance_is_not_fooled_by_rare_classes():
    g = torch.Generator().manual_seed(0)
    labels = (torch.rand(4000, generator=g) < 0.1).long()
    z = torch.rand(4000, 4, generator=g)
    scores = one_sparse_probe(z[:2000], labels[:2000], z[2000:], labels[2000:])
    assert (scores - 0.5).abs().max() < 0.06


def test_balanced_accuracy_known_answer():
    inside = torch.tensor([True, True, False, False, False, False])
    says = torch.tensor([[1, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    assert balanced_accuracy(says, inside).tolist() == [(0.5 + 0.75) / 2, 0.5]


def test_nmi_of_clusters_and_of_noise():
    labels = torch.arange(200) % 4
    g = torch.Generator().manual_seed(0)
    size = 1 + torch.rand(200, 1, generator=g)  # the length of a row does not matter
    assert cluster_nmi(torch.eye(8)[labels] * size, labels) == pytest.approx(1)
    assert cluster_nmi(torch.rand(200, 8, generator=g), labels) < 0.15


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
