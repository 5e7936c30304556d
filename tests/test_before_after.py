"""Scores of single latents by trying them all; the table where an answer is known."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from saeutils.before_after import Labelled, before_after, concept_scores
from saeutils.synthetic import Synthetic, SyntheticConfig
from saeutils.training import TrainConfig


def test_concept_scores_by_trying_them_all():
    generator = torch.Generator().manual_seed(0)
    z = torch.rand(2, 80, 5, generator=generator)
    z = z * (torch.rand(z.shape, generator=generator) > 0.4)
    member = (z[..., :3] + 0.8 * torch.rand(2, 80, 3, generator=generator) > 1).numpy()
    got = concept_scores(z[0], member[0], z[1], member[1])
    for c in range(3):
        best = {"f1": (-1, 0), "balanced": (-1, 0)}
        for j in range(5):
            levels = z[0, :, j].unique()
            for low, high in pairwise(levels):
                cut = (low + high) / 2
                f1, balanced = both(z[0, :, j] > cut, member[0][:, c])
                judged = both(z[1, :, j] > cut, member[1][:, c])
                best["f1"] = max(best["f1"], (f1, judged[0]))
                best["balanced"] = max(best["balanced"], (balanced, judged[1]))
        assert got.f1[c] == pytest.approx(best["f1"][1], abs=1e-6)
        assert got.balanced[c] == pytest.approx(best["balanced"][1], abs=1e-6)


def both(said, true):
    """F1 and balanced accuracy."""
    said = said.numpy()
    hits = (said & true).sum()
    balanced = hits / true.sum() + (~said & ~true).sum() / (~true).sum()
    return 2 * hits / (said.sum() + true.sum()), balanced / 2


def test_concepts_on_no_row_are_refused():
    z = torch.rand(10, 3)
    for bad in (np.zeros((10, 1), bool), np.ones((10, 1), bool)):
        with pytest.raises(ValueError, match="each concept"):
            concept_scores(z, bad, z, bad)
    some = np.arange(10)[:, None] > 4
    with pytest.raises(ValueError, match="all codes are zero"):
        concept_scores(0 * z, some, z, some)


def test_where_the_answer_is_known_refinement_helps_and_nulls_are_nulls():
    truth = Synthetic(
        SyntheticConfig(n=64, d=32, l0=3, largest=0.2, frequency="uniform")
    )
    x, acts = truth.sample(4000, seed=1)
    fires = (acts[:, :8] > 0).numpy()
    data = Labelled(truth.rows(8000), x, x[:2000], fires[:2000], x[2000:], fires[2000:])
    config = TrainConfig("topk", 64, 4, steps=300, batch_size=256, lr=1e-2)
    table = before_after(data, config, seeds=[0, 1], rounds=6, batch=4000)
    mean = table.groupby("name").mean(numeric_only=True)
    old, new = mean.loc["SAE's dictionary, OMP"], mean.loc["refined dictionary, OMP"]
    assert new["FVU"] < old["FVU"] < mean["FVU"]["random directions, OMP"]
    assert new["agreement"] > old["agreement"] > 0.5
    assert new["concept F1"] > max(old["concept F1"], 0.9)
    assert new["1-sparse probe %"] > 90
    shuffled = mean.loc["labels shuffled"]
    assert shuffled["concept F1"] < 0.2
    assert shuffled["1-sparse probe %"] == pytest.approx(50, abs=4)
    with pytest.raises(ValueError, match="two seeds"):
        before_after(data, config, seeds=[0])
