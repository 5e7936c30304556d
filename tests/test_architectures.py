"""Subjects behind fixed edge filters: known answers."""

import pytest
import torch

from saeutils.architectures import edge_filters
from saeutils.models import EdgeMLP


@pytest.mark.parametrize("bank", ["gabor", "sobel"])
def test_filters_are_balanced_and_come_in_opposite_pairs(bank):
    filters = edge_filters(bank)
    assert len(filters) == 8
    torch.testing.assert_close(filters.sum((1, 2)), torch.zeros(8))
    torch.testing.assert_close(filters.abs().sum((1, 2)), torch.ones(8))
    assert torch.equal(filters[:4], -filters[4:])


@pytest.mark.parametrize("bank", ["gabor", "sobel"])
@pytest.mark.parametrize("i", range(8))
def test_each_filter_answers_most_to_its_own_edge(bank, i):
    """Ink begins in the direction of i · 45 degrees, clockwise from the right."""
    filters = edge_filters(bank)
    size = filters.shape[1]
    v, u = torch.meshgrid(*[torch.arange(size) - size // 2] * 2, indexing="ij")
    angle = torch.tensor(i * torch.pi / 4)
    edge = (u * angle.cos() + v * angle.sin() > 0.3).float()
    assert (filters * edge).sum((1, 2)).argmax() == i


def test_sobel_is_the_published_one():
    want = torch.tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1.0]]) / 8
    torch.testing.assert_close(edge_filters("sobel")[0], want)


def test_edges_are_the_equation_and_have_no_answer_to_plain_paper():
    model = EdgeMLP((5, 3), bank="sobel", seed=1)
    x = torch.rand(2, 784, generator=torch.Generator().manual_seed(0))
    maps = torch.nn.functional.conv2d(
        x.reshape(2, 1, 28, 28), edge_filters("sobel").unsqueeze(1), padding=1
    ).relu()
    want = maps.reshape(2, 8, 7, 4, 7, 4).mean((3, 5)).reshape(2, 392)
    torch.testing.assert_close(model.edges(x.reshape(2, 1, 28, 28)), want)
    torch.testing.assert_close(model(x), model.head(model.fc2(model.fc1(want))))
    assert not model.edges(torch.zeros(1, 1, 28, 28)).any()


def test_names_seeds_and_bad_input():
    names = dict(EdgeMLP((5, 3)).named_children())
    assert list(names) == ["edges", "fc1", "fc2", "head"]
    a, b, c = EdgeMLP((5,), seed=1), EdgeMLP((5,), seed=1), EdgeMLP((5,), seed=2)
    assert torch.equal(a.fc1.linear.weight, b.fc1.linear.weight)
    assert not torch.equal(a.fc1.linear.weight, c.fc1.linear.weight)
    with pytest.raises(ValueError, match=r"gabor.*sobel.*'haar'"):
        EdgeMLP(bank="haar")
    with pytest.raises(ValueError, match=r"\(n, 784\)"):
        a(torch.zeros(3, 28, 28))
