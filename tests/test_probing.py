"""Probes and scores of latents: slow references, and answers known beforehand."""

import math

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from saeutils import plots, probing
from saeutils.examples import Codes


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def digits(n=400, d=12, seed=0, classes=4):
    """Codes: latent c fires on class c only (strength 1 to 2); the rest are noise."""
    g = generator(seed)
    y = torch.randint(classes, (n,), generator=g)
    z = torch.rand(n, d, generator=g) * (torch.rand(n, d, generator=g) < 0.2)
    z[:, :classes] = 0
    z[torch.arange(n), y] = 1 + torch.rand(n, generator=g)
    return z, y


# --- linear probes ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_linear_probe_finds_what_is_there_and_not_what_is_not(kind):
    (z, y), (z_test, y_test) = digits(seed=0), digits(seed=1)
    probe = probing.linear_probe(z, y, z_test, y_test, kind=kind)
    assert probe.accuracy == 1
    shuffled = y[torch.randperm(len(y), generator=generator())]
    null = probing.linear_probe(z[:, 4:], shuffled, z_test[:, 4:], y_test, kind=kind)
    assert null.accuracy == pytest.approx(1 / 4, abs=0.12)


def test_linear_probe_is_the_protocol_of_its_docstring():
    """Scaled by one number, C from the held-out part, fitted again on all rows."""
    z, y = digits(n=200)
    z, z_test, y_test = z[:, 4:], z[:50, 4:], y[:50]  # noise: C matters
    cs = (0.1, 10.0)
    got = probing.linear_probe(z, y, z_test, y_test, cs=cs, seed=3)
    scale = z.norm(dim=1).square().mean().sqrt()
    x = (z / scale).numpy()
    order = torch.randperm(200, generator=generator(3)).numpy()
    held, rest = order[:50], order[50:]
    for c in cs:
        slow = LogisticRegression(C=c, tol=1e-3, max_iter=500)
        slow.fit(x[rest], y.numpy()[rest])
        assert got.validation[c] == slow.score(x[held], y.numpy()[held])
    best = max(cs, key=lambda c: (got.validation[c], -c))
    assert best == got.C and got.at_edge
    slow = LogisticRegression(C=best, tol=1e-3, max_iter=500).fit(x, y.numpy())
    want = slow.score((z_test / scale).numpy(), y_test.numpy())
    assert got.accuracy == pytest.approx(want, abs=0.021)


def test_scaling_the_representation_changes_nothing():
    (z, y), test = digits(), digits(seed=1)
    z, more = z + 0.1, (test[0] + 0.1, test[1])  # dense
    a = probing.linear_probe(z, y, *more)
    b = probing.linear_probe(64 * z, y, 64 * more[0], more[1])
    assert a == b


def test_bad_probes_are_refused(unchecked):
    z, y = digits(40)
    with pytest.raises(ValueError, match='"logistic" or "svm", got \'ridge\''):
        probing.linear_probe(z, y, z, y, kind="ridge")
    with pytest.raises(ValueError, match="39 labels for 40 rows"):
        probing.linear_probe(z, y[1:], z, y)
    with pytest.raises(ValueError, match="must be positive"):
        probing.linear_probe(z, y, z, y, cs=(0.0,))
    with pytest.raises(ValueError, match="root mean square length of 0"):
        probing.linear_probe(0 * z, y, z, y)
    with pytest.raises(ValueError, match="two classes or more"):
        probing.single_probes(z, 0 * y)
    with pytest.raises(ValueError, match="39 labels for 40 rows"):
        probing.single_probes(z, y[1:])
    with pytest.raises(ValueError, match=r"each k must lie in 1..12, got \(13,\)"):
        probing.sparse_probes(z, y, z, y, ks=(13,))


# --- every single latent ---------------------------------------------------------


@given(st.integers(0, 10_000))
def test_single_probes_equal_scikit_learn_one_at_a_time(seed):
    """Overlapping classes, many zeros, negative values, a constant, a silent latent."""
    g = generator(seed)
    x, y = torch.randn(80, 5, generator=g), torch.randint(3, (80,), generator=g)
    x[:, 0] += y
    x[:, 1] = (x[:, 1] + 0.3 * y).relu()
    x[:, 3], x[:, 4] = 2.5, 0
    got = probing.single_probes(x, y, ridge=1e-9)
    for c in range(3):
        t = (y == c).numpy()
        u = np.where(t, 0.5 / t.sum(), 0.5 / (~t).sum())
        for i in range(3):
            # sklearn minimises ½ w² + C Σ weight · loss.
            slow = LogisticRegression(C=1e6, tol=1e-10, max_iter=1000)
            column = x[:, i : i + 1].double().numpy()
            slow.fit(column, t, sample_weight=u)
            a = column[:, 0] * slow.coef_[0] + slow.intercept_
            loss = (u * (np.logaddexp(0, a) - t * a)).sum()
            assert got.loss[i, c] == pytest.approx(loss, abs=1e-5)
            b = column[:, 0] * got.weight[i, c] + got.bias[i, c]
            assert (u * (np.logaddexp(0, b) - t * b)).sum() == pytest.approx(
                got.loss[i, c], abs=1e-9
            )
    np.testing.assert_allclose(got.loss[3:], probing.CHANCE, atol=1e-9)


def test_a_latent_that_fires_on_one_digit_only_is_found_and_stays_finite():
    z, y = digits()
    single = probing.single_probes(z, y)
    assert single.best()[0].tolist() == [0, 1, 2, 3]
    found = single.loss[range(4), range(4)]
    assert (found < 0.01).all() and np.isfinite(single.weight).all()
    assert (single.loss[4:] > 0.6).all() and (
        single.loss <= probing.CHANCE + 1e-9
    ).all()


def test_sparse_probes_know_the_answer():
    (z, y), test = digits(), digits(seed=1)
    frame = probing.sparse_probes(z, y, *test, ks=(1, 3))
    assert (frame["score"] == 1).all() and len(frame) == 8
    assert [found[0] for found in frame["latents"]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert frame["latents"].map(len).tolist() == [1, 3] * 4
    null = probing.sparse_probes(z[:, 4:], y, test[0][:, 4:], test[1], ks=(1, 3))
    assert null["score"].mean() == pytest.approx(0.5, abs=0.06)


def test_two_latents_do_what_none_can_alone():
    """Class 1 is where latent 0 minus latent 1 is positive."""
    x = torch.rand(2000, 3, generator=generator())
    y = (x[:, 0] > x[:, 1]).long()
    frame = probing.sparse_probes(x[:1000], y[:1000], x[1000:], y[1000:], ks=(1, 2))
    one, two = frame.groupby("k")["score"].mean()
    assert two > 0.97 and 0.65 < one < 0.85


# --- clusters --------------------------------------------------------------------


def test_clusters_of_known_groups():
    z, y = digits()
    z[:, 4:] = 0
    for normalise in (False, True):
        found = probing.k_means(z, y, normalise=normalise)
        assert found.nmi == pytest.approx(1) and found.ari == pytest.approx(1)
        assert found.silhouette > 0.5
    by_chance = y[torch.randperm(len(y), generator=generator())]
    null = probing.k_means(z, by_chance)
    assert null.nmi < 0.05 and abs(null.ari) < 0.05


def test_normalised_rows_differ_in_direction_only():
    """Two rays: lengths spread more than directions do."""
    g = generator()
    y = torch.randint(2, (300,), generator=g)
    rays = torch.tensor([[1.0, 0.1], [0.1, 1.0]])[y]
    x = rays * torch.logspace(-2, 2, 300)[torch.randperm(300, generator=g), None]
    assert probing.k_means(x, y, normalise=True).nmi == pytest.approx(1)
    assert probing.k_means(x, y).nmi < 0.8


# --- scores of a latent ----------------------------------------------------------


@given(st.integers(2, 40), st.integers(0, 10_000))
def test_monosemanticity_equals_the_double_loop(n, seed):
    g = generator(seed)
    z = torch.rand(n, 4, generator=g) * (torch.rand(n, 4, generator=g) < 0.4)
    z[:, 3] *= 1e-6  # as small as a rare latent's
    e = torch.randn(n, 5, generator=g)
    e[0] = 0
    unit = (e.double() / e.double().norm(dim=1, keepdim=True).clamp(min=1e-300)).numpy()
    a = z.double().numpy()
    for chunk in (1, 3, 1000):
        got = probing.monosemanticity(Codes(None, z, budget=4 * 5 * chunk), e)
        for i in range(4):
            top = bottom = 0.0
            for p in range(n):
                for q in range(n):
                    if p != q:
                        top += a[p, i] * a[q, i] * (unit[p] @ unit[q])
                        bottom += a[p, i] * a[q, i]
            fires = (a[:, i] > 0).sum()
            assert bool(got.excluded[i]) == (fires < 2)
            if fires >= 2:
                assert got.score[i] == pytest.approx(top / bottom, abs=1e-8)
            else:
                assert got.score[i].isnan()


def test_a_latent_of_one_digit_is_monosemantic_and_float32_would_not_say_so():
    """One strong firing and a faint one: squares of the first cancel."""
    z = torch.zeros(4, 2)
    z[0, 0], z[1, 0], z[2, 1], z[3, 1] = 3e4, 1e-4, 1.0, 1.0
    labels = torch.tensor([7, 7, 1, 2])
    e = torch.nn.functional.one_hot(labels).float()
    got = probing.monosemanticity(Codes(None, z), e)
    assert got.score.tolist() == pytest.approx([1, 0], abs=1e-4)
    x = z[:, 0]
    single = ((x @ e).square().sum() - x.square().sum()) / (x.sum() ** 2 - x @ x)
    assert not abs(single - 1) < 0.01


def test_purity_counts_the_strongest_and_leaves_out_what_fires_too_little():
    z, y = digits(n=200, d=6)
    z[:, 4] = 0
    z[:15, 4] = 1.0  # one firing short of 16
    got = probing.purity(Codes(None, z, labels=y), 16)
    assert got.score[:4].tolist() == [1, 1, 1, 1]
    assert got.excluded.tolist() == [False] * 4 + [True, False]
    top = z[:, 5].topk(16).indices
    assert got.score[5] == y[top].bincount().max() / 16
    with pytest.raises(ValueError, match="carry no labels"):
        probing.purity(Codes(None, z))


def test_bad_scores_are_refused(unchecked):
    z, _ = digits(20)
    with pytest.raises(ValueError, match="19 embeddings for 20 rows"):
        probing.monosemanticity(Codes(None, z), z[1:])
    with pytest.raises(ValueError, match="activations must be ≥ 0"):
        probing.monosemanticity(Codes(None, z - 0.5), z)


def test_chance_is_ln_2():
    assert math.log(2) == probing.CHANCE


# --- figures ---------------------------------------------------------------------


def test_sparse_probe_lines_are_means_and_bars_span_the_runs():
    frame = pd.DataFrame(
        {
            "name": ["a", "a", "a", "null"],
            "k": [1, 1, 2, 1],
            "score": [0.6, 0.8, 0.9, 0.5],
        }
    )
    line, null = plots.sparse_probes(frame, title="t", controls=["null"]).data
    assert tuple(line.x) == (1, 2) and tuple(line.y) == pytest.approx((0.7, 0.9))
    assert tuple(line.error_y.array) == pytest.approx((0.1, 0))
    assert tuple(line.error_y.arrayminus) == pytest.approx((0.1, 0))
    assert (line.line.dash, null.line.dash) == ("solid", "dash")


def test_maps_and_heat_maps_show_what_they_are_given():
    points, classes = torch.arange(8.0).view(4, 2), torch.tensor([3, 5, 3, 3])
    fig = plots.point_maps({"x": (points, classes), "y": (-points, classes)}, title="t")
    assert [trace.name for trace in fig.data] == ["3", "5"] * 2
    assert fig.data[0].x.tolist() == [0, 4, 6] and fig.data[3].y.tolist() == [-3]
    assert [trace.showlegend for trace in fig.data] == [True, True, False, False]
    values = torch.tensor([[0.1, 0.25], [0.5, 0.6]])
    fig = plots.by_class(values, ["a", "b"], [3, 5], title="t", bar="nats")
    assert list(map(list, fig.data[0].text)) == [["0.10", "0.25"], ["0.50", "0.60"]]
    assert fig.data[0].x == ("3", "5") and fig.layout.yaxis.autorange == "reversed"
