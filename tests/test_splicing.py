"""Edits at some positions, several hooks at once, and what they do to predictions."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from saeutils import baselines, language, metrics, models, splicing
from saeutils.models import evaluate
from saeutils.stories import Tokens


class Causal(nn.Module):
    """Tokens (n, positions) -> logits: two layers that see the mean of what was."""

    def __init__(self, vocabulary=7, d=5):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(vocabulary, d)
        self.first, self.second = nn.Linear(d, d), nn.Linear(d, d)
        self.head = nn.Linear(d, vocabulary)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in (self.first, self.second):
            before = x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]
            x = x + layer(before).tanh()
        return self.head(x)


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(1)
    ids = torch.randint(7, (12, 6))
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    return Causal(), (ids, labels)


def test_nothing_edited_is_the_model_itself(case):
    model, data = case
    found = splicing.evaluate_edits(model, {"clean": {}}, data)["clean"]
    assert found.evaluation == evaluate(model, data) and found.kl == 0


def test_kl_is_that_of_the_predictions_and_never_of_what_is_not_asked(case):
    model, (ids, labels) = case
    edit = {"head": lambda logits: 2 * logits}
    got = splicing.evaluate_edits(model, {"": edit}, (ids, labels), batch_size=7)[""]
    with torch.no_grad():
        logits = model(ids)[labels != -100]
    p, q = logits.softmax(-1), (2 * logits).softmax(-1)
    assert got.kl == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-5)
    nats = -q.gather(1, labels[labels != -100][:, None]).log().mean().item()
    assert got.evaluation.cross_entropy == pytest.approx(nats, rel=1e-5)


def test_only_the_positions_asked_for_are_edited(case):
    model, (ids, _) = case
    where = torch.zeros_like(ids, dtype=torch.bool)
    where[:, 3] = True
    with torch.no_grad():
        clean = model(ids)
        with splicing.edited(model, "first", torch.zeros_like, where):
            changed = model(ids)
    assert torch.equal(clean[:, :3], changed[:, :3])  # nothing before sees it
    assert (clean[:, 3:] != changed[:, 3:]).any(-1).all()
    assert not model.first._forward_hooks


def test_where_counts_through_the_batches_and_in_the_mean(case):
    model, data = case
    where = data[0] > 2  # of another shape in every row
    rows = []
    with (
        torch.no_grad(),
        splicing.edited(model, "first", lambda a: rows.append(a) or a, where),
    ):
        model(data[0])
    mean = rows[0].mean(0)
    calls = dict(where=where, batch_size=12)  # two texts at a time
    got = splicing.in_model(model, "first", lambda a: mean.expand_as(a), data, **calls)
    same = pytest.approx(got.mean_ablated.cross_entropy, rel=1e-6)
    assert got.spliced.cross_entropy == same != got.clean.cross_entropy
    everywhere = splicing.in_model(model, "first", torch.zeros_like, data)
    assert got.zero_ablated != everywhere.zero_ablated
    nowhere = torch.zeros_like(where)
    nowhere[0, 0] = True
    little = splicing.in_model(model, "first", torch.zeros_like, data, where=nowhere)
    assert 0 < little.kl < everywhere.kl


def test_two_hooks_at_once_are_the_composition(case):
    model, data = case
    edits = {"first": torch.zeros_like, "second": lambda a: a / 2}
    alone = {hook: {hook: edit} for hook, edit in edits.items()}
    found = splicing.evaluate_edits(model, alone | {"both": edits}, data)
    with (
        splicing.edited(model, "first", edits["first"]),
        splicing.edited(model, "second", edits["second"]),
    ):
        want = evaluate(model, data)
    assert found["both"].evaluation == want
    assert found["first"] != found["second"] != found["both"]
    assert not model.first._forward_hooks and not model.second._forward_hooks


def test_many_at_once_are_each_alone(case):
    model, data = case
    edits = {"half": lambda a: a / 2, "noise": lambda a: a + 1}
    together = splicing.in_models(model, "second", edits, data, batch_size=13)
    for name, edit in edits.items():
        assert together[name] == splicing.in_model(
            model, "second", edit, data, batch_size=13
        )
    assert together["half"].kl != together["noise"].kl


def test_scorecards_are_scorecards(case):
    model, data = case
    rows = models.activations_at(model, "first", data).flatten(0, 1)
    saes = baselines.controls(rows, 9, 2)
    init = {"untrained SAE": saes["untrained SAE"].W_dec}
    common = dict(model=model, data=data, hook="first", eval_set="own")
    cards = metrics.scorecards(saes, rows, init=init, **common)
    assert [card.name for card in cards] == list(saes)
    for card in cards:
        sae, start = saes[card.name], init.get(card.name)
        alone = metrics.scorecard(sae, rows, name=card.name, init=start, **common)
        assert card.in_model == alone.in_model
        assert card.row() == pytest.approx(alone.row(), nan_ok=True)
    row = cards[0].row()
    assert row["KL (nats)"] == cards[0].in_model.kl > 0
    assert set(metrics.TEXT_COLUMNS) <= set(row)


def test_what_does_not_fit_is_refused(case):
    model, data = case
    where = torch.ones(12, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"where has shape \(12, 5\), the labels"):
        splicing.in_model(model, "first", torch.zeros_like, data, where=where)
    common = dict(model=model, data=data, eval_set="own")
    with pytest.raises(ValueError, match="name a hook"):
        metrics.scorecards({"": baselines.PCA(torch.eye(5), 1)}, torch.eye(5), **common)
    with pytest.raises(ValueError, match="at least one autoencoder"):
        metrics.scorecards({}, torch.eye(5), hook="first", **common)


def test_story_positions_leave_out_bos_and_padding():
    ids = np.array([[1, 5, 6, 1, 1], [1, 1, 7, 8, 9]])
    spans = [[(0, 0), (0, 2), (2, 4), (0, 0), (0, 0)], [(0, 0), (0, 1), (1, 2), (2, 3)]]
    spans[1].append((3, 4))
    found = language.story_positions(Tokens(ids, np.arange(2), spans))
    # The second story holds the token that also begins it: position 1 is text.
    assert found.tolist() == [
        [False, True, True, False, False],
        [False, True, True, True, True],
    ]
    packed = language.story_positions(Tokens(ids, np.arange(2), []))
    assert packed.tolist() == (ids != 1).tolist()


def test_kl_stays_unknown_when_nothing_measured_it():
    clean = models.Evaluation(1.0, 0.5)
    assert math.isnan(splicing.InModel("fc1", clean, clean, clean, clean).kl)
