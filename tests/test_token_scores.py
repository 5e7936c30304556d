"""Known answers for token scores, and models that forgot."""

import numpy as np
import pytest
import torch
from torch import nn

from saeutils import baselines, metrics
from saeutils.examples import Codes
from saeutils.random_models import reinitialised
from saeutils.token_scores import error_by_group, same_token, token_scores


def drawn(n=600, kinds=20, seed=0):
    return torch.randint(kinds, (n,), generator=torch.Generator().manual_seed(seed))


def test_the_token_explains_all_of_one_latent_and_nothing_of_another():
    tokens = drawn() + 100
    g = torch.Generator().manual_seed(1)
    z = torch.zeros(600, 4)
    z[:, 0] = 3.0 * (tokens == 107)  # fires on one token, always alike
    z[:, 1] = torch.rand(600, generator=g)  # knows nothing of tokens
    z[:, 2] = (tokens % 2).float()  # fires on ten tokens alike
    got = token_scores(Codes(None, z), tokens)
    assert got.explained[0] == pytest.approx(1) == got.explained[2].item()
    assert abs(got.explained[1]) < 0.05
    assert got.explained[3].isnan() and got.top_share[3].isnan()
    assert got.top_token.tolist()[0] == 107 and got.top_token[3] == -1
    assert got.top_share[0] == 1 and 0.1 < got.top_share[2] < 0.2
    counts = [(tokens == 107).sum(), 600, z[:, 2].sum(), 0]
    assert got.firings.tolist() == [int(count) for count in counts]


def test_explained_is_epsilon_squared_written_out():
    tokens, z = drawn(), torch.randn(600, 3, generator=torch.Generator().manual_seed(2))
    z = (z + (tokens[:, None] == 3)).relu()
    got = token_scores(Codes(None, z, budget=3000), tokens)  # many chunks
    x = z.double()
    within = sum(
        (x[tokens == t] - x[tokens == t].mean(0)).square().sum(0) for t in range(20)
    )
    total = (x - x.mean(0)).square().sum(0)
    want = 1 - (within / (600 - 20)) / (total / 599)
    assert torch.allclose(got.explained, want)


def test_shuffled_tokens_explain_nothing_on_average():
    z = torch.rand(400, 1) * (torch.rand(400, 1) > 0.7)
    null = [
        token_scores(Codes(None, z), drawn(400, 100, seed)).explained.item()
        for seed in range(60)
    ]
    assert abs(np.mean(null)) < 4 * np.std(null) / np.sqrt(60)
    assert max(null) > 0 > min(null)


def test_same_token_looks_at_the_strongest_place_of_each_story():
    ids = torch.arange(30).repeat_interleave(4)
    tokens = torch.arange(120) % 4
    z = torch.zeros(120, 3)
    z[:, 0] = (tokens == 2) * torch.arange(1, 121)  # always token 2
    z[torch.arange(30) * 4 + torch.arange(30) % 2, 1] = torch.arange(1.0, 31.0)
    z[:7, 2] = 1.0  # two stories only
    got = same_token(Codes(None, z, ids=ids), tokens, n=10)
    assert got[0] == 1 and got[1] == 0.5 and got[2].isnan()


def test_groups_add_up_to_the_scorecard():
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(3))
    rows[:100] *= 3
    groups = (torch.arange(500) < 100).long() * 2  # groups 2 and 0; 1 is empty
    sae = baselines.neurons(rows, 2)
    got = error_by_group(sae, rows, groups, budget=2000)
    card = metrics.scorecard(sae, rows, eval_set="own")
    assert got["group"].tolist() == [0, 2] and got["rows"].tolist() == [400, 100]
    scatter = (rows - rows.mean(0)).double().square().sum(1)
    weight = [scatter[groups == g].sum() / scatter.sum() for g in (0, 2)]
    assert (got["FVU"] * np.array(weight)).sum() == pytest.approx(card.fvu, rel=1e-5)
    assert np.average(got["L0"], weights=got["rows"]) == pytest.approx(card.l0)
    assert got["share of error"].sum() == pytest.approx(1)


def test_what_does_not_belong_together_is_refused():
    z, rows = torch.eye(8), torch.randn(8, 3)
    with pytest.raises(ValueError, match="5 tokens for 8 rows"):
        token_scores(Codes(None, z), torch.arange(5))
    with pytest.raises(ValueError, match="5 tokens for 8 rows"):
        same_token(Codes(None, z), torch.arange(5))
    with pytest.raises(ValueError, match="8 rows with 8 kinds of token"):
        token_scores(Codes(None, z), torch.arange(8))
    with pytest.raises(ValueError, match="5 groups from 0 for 8 rows"):
        error_by_group(baselines.neurons(rows, 1), rows, torch.arange(5))


def test_a_reinitialised_model_keeps_its_values_and_nothing_else():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    model[2].weight = model[0].weight  # tied
    before = [p.clone() for p in model.parameters()]
    random = reinitialised(model, seed=3)
    for old, kept, new in zip(
        before, model.parameters(), random.parameters(), strict=True
    ):
        assert torch.equal(old, kept) and not torch.equal(old, new)
        assert torch.equal(old.flatten().sort()[0], new.flatten().sort()[0])
    assert random[2].weight is random[0].weight
    again, other = reinitialised(model, seed=3), reinitialised(model, seed=4)
    assert torch.equal(random[1].weight, again[1].weight)
    assert not torch.equal(random[1].weight, other[1].weight)
    with pytest.raises(ValueError, match="ReLU has no parameters"):
        reinitialised(nn.ReLU())
