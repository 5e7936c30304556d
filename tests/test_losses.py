"""Extra loss terms: each equals a slow obvious one, and does what it is for."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from saeutils import losses
from saeutils.datasets import ImageData
from saeutils.models import MLP, EdgeMLP, Step, train_classifier


def columns(n=60, classes=3):
    """Class c is a bright column c on grey noise; the last four rows are noise too."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=g)
    x = torch.randint(60, (n, 28, 28), generator=g, dtype=torch.uint8)
    x[torch.arange(n), :24, 8 + 4 * labels] = 255
    return ImageData(x, labels, torch.arange(n), split="train", name="columns")


DATA = columns()


def step(model=None, n=8, hook="fc1"):
    """What a loss sees of the first n images."""
    model = model or MLP((12, 6))
    pixels = DATA.pixels[:n].requires_grad_()
    h = model.fc1(pixels)
    logits = model.head(model.fc2(h))
    return Step(torch.arange(n), pixels, DATA.labels[:n], logits, {hook: h})


def test_activity_is_the_mean_size():
    s = step()
    term = losses.activity("fc1", 0.5)(s)
    assert term.item() == pytest.approx(0.5 * s.acts["fc1"].mean().item())


def test_group_sparsity_equals_the_loop_and_has_a_gradient_at_silence():
    s = step()
    h = s.acts["fc1"]
    slow = sum(h[i, g : g + 4].norm() for i in range(8) for g in (0, 4, 8))
    term = losses.group_sparsity("fc1", 3, 2.0)(s)
    assert term.item() == pytest.approx(2 * slow.item() / 8 / 12**0.5, rel=1e-4)
    silent = torch.zeros(2, 12, requires_grad=True)
    losses.group_sparsity("h", 3, 1.0)(s._replace(acts={"h": silent})).backward()
    assert silent.grad.isfinite().all()
    with pytest.raises(ValueError, match="12 units of 'fc1' in 5 equal groups"):
        losses.group_sparsity("fc1", 5, 1.0)(s)


def test_group_sparsity_prefers_one_group():
    """Of the same length: in one group, or spread over all."""
    s = step()
    one, spread = torch.zeros(1, 12), torch.full((1, 12), 12**-0.5)
    one[0, :4] = 0.5
    term = losses.group_sparsity("h", 3, 1.0)
    first, second = (term(s._replace(acts={"h": h})) for h in (one, spread))
    assert first.item() == pytest.approx(second.item() / 3**0.5, rel=1e-4)


def test_contrastive_equals_the_double_loop():
    s = step()
    h = s.acts["fc1"].detach()
    total, rows = 0.0, 0
    for i in range(8):
        others = [j for j in range(8) if j != i]
        sims = {j: cosine_similarity(h[i], h[j], dim=0) / 0.2 for j in others}
        log_z = torch.stack([*sims.values()]).logsumexp(0)
        same = [j for j in others if s.labels[j] == s.labels[i]]
        if same:
            total -= sum(sims[j] - log_z for j in same) / len(same)
            rows += 1
    term = losses.contrastive("fc1", 3.0)(s)
    assert term.item() == pytest.approx(3 * total.item() / rows, rel=1e-4)


def test_contrastive_without_any_pair_is_zero_with_a_gradient():
    s = step()
    h = torch.rand(3, 4, requires_grad=True)
    term = losses.contrastive("h", 1.0)(
        s._replace(labels=torch.tensor([0, 1, 2]), acts={"h": h})
    )
    term.backward()
    assert term.item() == 0 and h.grad.isfinite().all()


def test_input_gradient_equals_finite_differences():
    model = MLP((12, 6)).double()
    s = step()
    pixels = s.pixels.detach().double().requires_grad_()
    s = s._replace(pixels=pixels, logits=model(pixels))
    mask = torch.zeros(784, dtype=torch.bool)
    mask[[3, 300]] = True
    total = 0.0
    for i in (3, 300):
        bump = torch.zeros(784).double()
        bump[i] = 1e-6
        with torch.no_grad():
            up, down = (model(pixels + sign * bump) for sign in (1, -1))
        slope = (up.log_softmax(1) - down.log_softmax(1)).sum(1) / 2e-6
        total += slope.square().mean().item()
    term = losses.input_gradient(mask, 0.5)(s)
    assert term.item() == pytest.approx(total / 2, rel=1e-4)


def test_cosine_pull_equals_the_loop():
    s = step()
    targets = torch.rand(2, 12)
    member = torch.rand(len(DATA), 2, generator=torch.Generator().manual_seed(1)) > 0.5
    h = s.acts["fc1"]
    far = [
        1 - cosine_similarity(h[i], targets[g], dim=0)
        for i in range(8)
        for g in range(2)
        if member[i, g]
    ]
    term = losses.cosine_pull("fc1", targets, member, 2.0)(s)
    assert term.item() == pytest.approx(2 * torch.stack(far).mean().item(), rel=1e-4)
    with pytest.raises(ValueError, match="2 targets, but members of 3"):
        losses.cosine_pull("fc1", targets, torch.ones(4, 3, dtype=torch.bool), 1.0)


# --- in training ----------------------------------------------------------


def trained(term=None, hooks=("fc1",), model=None):
    model = model or MLP((12, 6), seed=0)
    history = train_classifier(
        model,
        DATA,
        epochs=12,
        batch_size=20,
        weight_decay=0.0,
        extra_loss=term,
        hooks=hooks if term else (),
        progress=False,
    )
    return model, history


def test_a_term_of_zero_changes_nothing():
    plain, history = trained()
    same, with_term = trained(losses.activity("fc1", 0.0))
    assert "extra_loss" not in history
    assert (with_term.extra_loss == 0).all()
    assert history.loss.tolist() == with_term.loss.tolist()
    for a, b in zip(plain.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)


def test_each_term_does_what_it_is_for():
    def activations(model):
        return model.fc1(DATA.pixels).detach()

    def apart(h):  # cosine within labels above that between labels
        c = torch.nn.functional.normalize(h, dim=1)
        same = DATA.labels[:, None] == DATA.labels
        return ((c @ c.T)[same].mean() - (c @ c.T)[~same].mean()).item()

    plain, _ = trained()
    h = activations(plain)
    quiet, _ = trained(losses.activity("fc1", 1.0))
    assert activations(quiet).mean() < 0.7 * h.mean()
    sorted_out, _ = trained(losses.contrastive("fc1", 1.0))
    assert apart(activations(sorted_out)) > apart(h) + 0.1
    targets = torch.eye(3).repeat_interleave(4, 1)  # four units for each label
    member = torch.nn.functional.one_hot(DATA.labels).bool()
    pulled, _ = trained(losses.cosine_pull("fc1", targets, member, 5.0))
    along = cosine_similarity(activations(pulled), targets[DATA.labels])
    assert along.mean() > cosine_similarity(h, targets[DATA.labels]).mean() + 0.3
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[24:] = True
    blind, _ = trained(losses.input_gradient(mask.flatten(), 10.0), hooks=())
    share = []
    for model in (plain, blind):
        x = DATA.pixels.requires_grad_()
        size = torch.autograd.grad(model(x).log_softmax(1).sum(), x)[0].abs().mean(0)
        share.append((size[mask.flatten()].sum() / size.sum()).item())
    assert share[1] < share[0] / 2


def test_fixed_filters_stay_as_they_are():
    model = EdgeMLP((8,))
    before = model.edges.conv.weight.clone()
    after, history = trained(model=model)
    assert torch.equal(after.edges.conv.weight, before)
    assert history.loss.iloc[-1] < history.loss.iloc[0]


def test_what_is_refused():
    with pytest.raises(ValueError, match="are for an extra_loss, and none is given"):
        train_classifier(MLP((4,)), DATA, hooks=["fc1"], progress=False)
    with pytest.raises(ValueError, match="no hook point 'fc9'"):
        trained(losses.activity("fc9", 1.0), hooks=["fc9"])
    with pytest.raises(ValueError, match=r"gave shape \(20, 12\), expected a number"):
        trained(lambda s: s.acts["fc1"])
