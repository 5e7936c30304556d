"""Attributions with known answers: linear models, slow references, exact orders."""

from itertools import permutations

import jaxtyping
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from saeutils import attribution, plots
from saeutils.models import CNN, MLP
from saeutils.sae import export, initial_params


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


class Linear(nn.Module):
    """f(x, u) = W_u · x + b_u: every exact method must give W_u x, pixel by pixel."""

    def __init__(self, d=784, units=3):
        super().__init__()
        self.W = nn.Parameter(rand(units, d, seed=5) - 0.5)
        self.b = nn.Parameter(torch.arange(units).float())

    def forward(self, x, unit):
        return (x * self.W[unit]).sum(1) + self.b[unit]


def sae_on(d_in, d_sae=6, architecture="topk"):
    params = initial_params(architecture, d_sae, torch.full((d_in,), 0.1), seed=0)
    params["b_enc"] = torch.linspace(-0.2, 0.3, d_sae)
    return export(params, architecture, k=2)


# --- what is attributed ---------------------------------------------------------


def test_pre_activation_is_what_the_sae_computes_before_its_k_largest():
    model, sae = MLP((8, 4)), sae_on(8)
    x, unit = rand(7, 784), torch.tensor([0, 5, 2, 2, 1, 3, 4])
    a = model.fc1(x)
    want = (a - sae.b_dec) @ sae.W_enc + sae.b_enc
    got = attribution.PreActivation(model, "fc1", sae)(x, unit)
    torch.testing.assert_close(got, want[torch.arange(7), unit])
    code = attribution.PreActivation(model, "fc1", sae, code=True)(x, unit)
    torch.testing.assert_close(code, sae.encode(a)[torch.arange(7), unit])


def test_pre_activation_of_neurons_and_logits():
    model, x, unit = CNN((2, 3), 5), rand(4, 784), torch.tensor([3, 0, 1, 3])
    logits = attribution.PreActivation(model, "head")(x, unit)
    torch.testing.assert_close(logits, model(x)[torch.arange(4), unit])
    neurons = attribution.PreActivation(model, "fc1.linear")(x, unit)
    assert (neurons < 0).any()
    rectified = attribution.PreActivation(model, "fc1")(x, unit)
    torch.testing.assert_close(neurons.relu(), rectified)
    assert not model.fc1.linear._forward_hooks, "a hook was left behind"


def test_pre_activation_refuses_what_it_cannot_do():
    model, x, one = CNN((2, 3), 5), rand(1, 784), torch.tensor([0])
    with pytest.raises(ValueError, match="no hook point 'fc9'"):
        attribution.PreActivation(model, "fc9")
    with pytest.raises(ValueError, match="code=True needs the SAE"):
        attribution.PreActivation(model, "fc1", code=True)
    with pytest.raises(ValueError, match="Linear is no SAE"):
        attribution.PreActivation(model, "fc1", nn.Linear(5, 5))
    with pytest.raises(ValueError, match=r"'conv1' gives \(1, 2, 14, 14\)"):
        attribution.PreActivation(model, "conv1")(x, one)
    with pytest.raises(ValueError, match=r"units must lie in 0..4"):
        attribution.PreActivation(model, "fc1")(x, one + 5)


# --- methods ---------------------------------------------------------------------


def test_a_linear_model_is_attributed_exactly():
    f, x, unit = Linear(), rand(5, 784), torch.tensor([0, 1, 2, 1, 0])
    W = f.W.detach()[unit]
    want = {
        "gradient": W,
        "|gradient|": W.abs(),
        "SmoothGrad": W.abs(),
        "input × gradient": W * (x - 0.25),
        "integrated gradients": W * (x - 0.25),
    }
    for method, answer in want.items():
        got = attribution.attribute(f, x, unit, method, baseline=0.25, steps=4)
        torch.testing.assert_close(got, answer, atol=1e-5, rtol=1e-4)
    whole = attribution.attribute(f, x, unit, "integrated gradients", baseline=0.25)
    assert attribution.completeness_error(f, x, unit, whole, 0.25) < 1e-5
    assert attribution.completeness_error(f, x, unit, 1.5 * whole, 0.25) == (
        pytest.approx(0.5, abs=1e-4)
    )


def test_occlusion_equals_the_slow_obvious_one():
    f, x, unit = Linear(), rand(2, 784), torch.tensor([0, 2])
    got = attribution.attribute(f, x, unit, "occlusion", window=4, baseline=0.1)
    total, count = torch.zeros(2, 28, 28), torch.zeros(28, 28)
    for i in range(0, 25, 2):
        for j in range(0, 25, 2):
            masked = x.view(2, 28, 28).clone()
            masked[:, i : i + 4, j : j + 4] = 0.1
            change = f(x, unit) - f(masked.flatten(1), unit)
            total[:, i : i + 4, j : j + 4] += change.detach()[:, None, None]
            count[i : i + 4, j : j + 4] += 1
    torch.testing.assert_close(got, (total / count).flatten(1), atol=1e-4, rtol=1e-3)


def test_integrated_gradients_add_up_on_a_real_network():
    """On the pre-activation; on the code of a TopK SAE they do not."""
    model, sae = MLP((32,)), sae_on(32, 64)
    x, unit = rand(20, 784), torch.arange(20)
    unit = sae.encode(model.fc1(x)).argmax(1)
    method, errors = "integrated gradients", []
    for code in (False, True):
        f = attribution.PreActivation(model, "fc1", sae, code=code)
        values = attribution.attribute(f, x, unit, method, steps=128)
        errors.append(attribution.completeness_error(f, x, unit, values))
    assert errors[0] <= 0.01 < errors[1]


def test_grad_cam_is_its_equation():
    model, x, unit = CNN((2, 3), 5), rand(2, 784), torch.tensor([1, 4])
    f = attribution.PreActivation(model, "fc1.linear")
    got = attribution.attribute(f, x, unit, "Grad-CAM", layer=model.conv2)
    maps = model.conv1(x.view(-1, 1, 28, 28))
    maps = model.conv2(maps).detach().requires_grad_()
    out = model.fc1.linear(maps.flatten(1))[torch.arange(2), unit].sum()
    (gradient,) = torch.autograd.grad(out, maps)
    cam = (gradient.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True).relu()
    cam = nn.functional.interpolate(cam, (28, 28), mode="bilinear")
    torch.testing.assert_close(got, cam.flatten(1).detach())
    assert got.any()


def test_attributions_come_from_the_seed_alone_and_any_batch_gives_the_same():
    f = attribution.PreActivation(MLP((8,)), "fc1.linear")
    x, unit = rand(6, 784), torch.arange(6)
    for method in ("SmoothGrad", "integrated gradients", "occlusion"):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        a = attribution.attribute(f, x, unit, method, seed=3, batch=6)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(
            a, attribution.attribute(f, x, unit, method, seed=3, batch=6)
        )
        if method != "SmoothGrad":
            b = attribution.attribute(f, x, unit, method, batch=100)
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert not x.requires_grad and f.model.fc1.linear.weight.grad is None


def test_bad_requests_are_refused(unchecked):
    f, x, unit = Linear(), rand(2, 784), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="'saliency': expected one of"):
        attribution.attribute(f, x, unit, "saliency")
    with pytest.raises(ValueError, match="Grad-CAM needs layer="):
        attribution.attribute(f, x, unit, "Grad-CAM")
    with pytest.raises(ValueError, match="2 rows, 1 units"):
        attribution.attribute(f, x, unit[:1], "gradient")


# --- scores ------------------------------------------------------------------------


def test_the_best_order_of_a_linear_model_beats_every_other_one():
    """Six pixels, all 720 orders: none deletes faster, none inserts faster."""
    f, x, unit = Linear(6, 1), rand(1, 6) + 0.1, torch.tensor([0])
    f.W.data = torch.tensor([[3.0, -1, 2, 0.5, -2, 1]])
    exact = attribution.attribute(f, x, unit, "input × gradient")
    areas = {False: [], True: []}
    for order in permutations(range(6)):
        for insert, found in areas.items():
            values = torch.tensor([order]).float()
            c = attribution.curve(f, x, unit, values, insert=insert, steps=6)
            found.append(attribution.area(c))
    for insert, best in ((False, min), (True, max)):
        c = attribution.curve(f, x, unit, exact, insert=insert, steps=6)
        assert attribution.area(c) == pytest.approx(best(areas[insert]), abs=1e-6)
        assert c[0] == pytest.approx(0 if insert else 1, abs=1e-6)
        assert c[-1] == pytest.approx(1 if insert else 0, abs=1e-6)


def test_a_curve_equals_the_slow_obvious_one():
    f, x, unit = Linear(8, 2), rand(2, 8), torch.tensor([0, 1])
    f.W.data.abs_()
    values = rand(2, 8, seed=4) - 0.5
    got = attribution.curve(f, x, unit, values, baseline=0.3, steps=4)
    blank = torch.full((1, 8), 0.3)
    want = []
    for count in (0, 2, 4, 6, 8):
        total = 0
        for i in range(2):
            row = x[i : i + 1].clone()
            for pixel in sorted(range(8), key=lambda p: -values[i, p])[:count]:
                row[0, pixel] = 0.3
            total += (f(row, unit[i : i + 1]) - f(blank, unit[i : i + 1])).item()
        want.append(total)
    torch.testing.assert_close(got, torch.tensor(want) / want[0], atol=1e-5, rtol=1e-4)


def test_pixels_of_equal_value_go_in_random_order():
    """Only the first half matters; all equal, so half of f is gone half way."""
    f, x, unit = Linear(784, 1), torch.ones(50, 784), torch.zeros(50).long()
    f.W.data.zero_()
    f.W.data[:, :392] = 1
    flat = attribution.curve(f, x, unit, torch.zeros(50, 784), steps=2)
    assert flat[1] == pytest.approx(0.5, abs=0.03)


def test_rows_that_do_not_excite_their_unit_are_refused():
    f, x, unit = Linear(4, 1), rand(2, 4), torch.tensor([0, 0])
    f.W.data.abs_().neg_()
    with pytest.raises(ValueError, match="choose rows that excite their units"):
        attribution.curve(f, x, unit, x)


def test_rank_correlation_is_scipys():
    a, b = rand(3, 40) - 0.5, rand(3, 40, seed=1) - 0.5
    a[0, :20] = 0  # ties
    b[2] = 1  # constant
    where = rand(3, 40, seed=2) < 0.6
    got = attribution.rank_correlation(a, b, where)
    for i in (0, 1):
        want = spearmanr(a[i][where[i]].abs(), b[i][where[i]].abs()).statistic
        assert got[i] == pytest.approx(want)
    assert got[2].isnan()
    table = attribution.agreement({"a": a[:2], "b": b[:2], "a again": -2 * a[:2]})
    assert table.loc["a", "a again"] == pytest.approx(1)
    np.testing.assert_allclose(table, table.T)
    assert (np.diag(table) == 1).all()


def test_shares_and_junk():
    images = torch.zeros(3, 2, 2, dtype=torch.uint8)
    images[1, 0, 1], images[:, 1, 1] = 9, 7
    junk = attribution.constant_pixels(images)
    assert junk.tolist() == [True, False, True, True]
    values = torch.tensor([[1.0, -1, 0, 2], [0, -5, 0, 0]])
    assert attribution.share_on(values, junk) == pytest.approx((3 / 4 + 0) / 2)


def test_randomised_weights_are_the_same_numbers_elsewhere():
    f = attribution.PreActivation(MLP((8,)), "fc1", sae_on(8))
    other = attribution.randomised(f, seed=1)
    pairs = list(zip(f.parameters(), other.parameters(), strict=True))
    for p, q in pairs:
        torch.testing.assert_close(p.flatten().sort()[0], q.flatten().sort()[0])
    assert not torch.equal(*pairs[0])
    again = attribution.randomised(f, seed=1)
    x, unit = rand(3, 784), torch.tensor([0, 1, 2])
    assert torch.equal(other(x, unit), again(x, unit))
    assert not torch.allclose(other(x, unit), f(x, unit))


def test_sanity_knows_a_good_method_from_a_picture_of_the_digit():
    """Half of the ink matters, by weights of both signs; a quarter is paper."""
    f = Linear(784, 2)
    f.W.data[:, 588:] = 0
    f.W.data[:, 392:588].abs_().mul_(10)
    x, unit = rand(30, 784, seed=8), torch.arange(30) % 2
    x[:, :196] = 0
    junk = torch.zeros(784, dtype=torch.bool)
    junk[:196] = True
    methods = ["|gradient|", "input × gradient", "integrated gradients"]
    result = attribution.sanity(f, x, unit, methods, junk=junk, seed=0)
    table = result.table.set_index("name")
    assert list(table.index) == [*methods, *attribution.CONTROLS]
    failed = attribution.failed_tests(result.table)
    assert list(failed) == methods and not failed[methods[1]] and not failed[methods[2]]
    assert failed["|gradient|"] == ["junk %"]
    null, noise = (table.loc[name] for name in attribution.CONTROLS)
    assert table.loc["input × gradient", "deletion"] < null["deletion"]
    assert noise["deletion"] == pytest.approx(0.5, abs=0.05)
    assert noise["insertion"] == pytest.approx(0.5, abs=0.05)
    assert noise["junk %"] == pytest.approx(25, abs=1)
    assert null["ink %"] == 100 and null["junk %"] == 0
    assert null["ρ random, all pixels"] > null["ρ random"] + 0.1
    assert table["incomplete %"].dropna().max() < 0.1
    for name, curve in result.deletion.items():
        assert attribution.area(curve) == pytest.approx(table.loc[name, "deletion"])


def test_what_passes_is_decided_over_seeds_and_never_a_control():
    good = {"deletion": 0.0, "insertion": 1.0, "ρ random": 0.3, "junk %": 0.0}
    null = {"deletion": 0.1, "insertion": 0.9, "ρ random": 0.3, "junk %": 0.0}
    rows = [dict(name="good", **good)] * 2
    rows += [dict(name=attribution.CONTROLS[0], **null)] * 2
    bad = {"deletion": 0.3, "insertion": 0.7, "ρ random": 0.6, "junk %": 3.0}
    for score, value in bad.items():  # bad on average over two seeds
        rows.append(dict(good, name=f"bad {score}"))
        rows.append(dict(good, name=f"bad {score}") | {score: value})
    got = attribution.failed_tests(pd.DataFrame(rows))
    assert got == {"good": []} | {f"bad {score}": [score] for score in bad}


# --- figures -----------------------------------------------------------------------


def test_overlays_keep_sign_place_and_each_its_own_scale():
    images = torch.zeros(2, 28, 28, dtype=torch.uint8)
    images[0, 3, 5], images[1, 27, 27] = 255, 51
    values = torch.zeros(2, 784)
    values[0, :20], values[1, 783] = -4.0, 1e-3
    fig = plots.attributions(images, {"m": values}, row_titles=["a", "b"], title="t")
    below, above = (trace.z for trace in fig.data)
    pitch = below.shape[0] // 2
    assert below[3, 5] == 100 and below[3, 31 + 5] == 22  # 28 + 3 a cell
    assert below[pitch + 27, 27] == 20
    assert (above[0, 31 : 31 + 20] == -100).all() and not above[:, :31].any()
    assert above[pitch + 27, 31 + 27] == 100
    assert [a.text for a in fig.layout.annotations] == ["image", "m", "a", "b"]


def test_curves_and_tables_show_what_they_are_given():
    c = torch.tensor([1.0, 0.4, 0])
    fig = plots.removal_curves(
        {"deletion": {"m": c, "null": c}, "insertion": {"m": c.flip(0)}},
        title="t",
        controls=["null"],
    )
    assert [tuple(trace.x) for trace in fig.data] == [(0, 50, 100)] * 3
    assert tuple(fig.data[2].y) == pytest.approx((0, 0.4, 1))
    assert fig.data[0].line.color == fig.data[2].line.color != fig.data[1].line.color
    assert [trace.showlegend for trace in fig.data] == [True, True, False]
    frame = pd.DataFrame([[1, 0.5], [0.5, 1]], ["a", "b"], ["a", "b"])
    fig = plots.agreement({"x": frame}, title="t")
    assert list(map(list, fig.data[0].text)) == [["1.00", "0.50"], ["0.50", "1.00"]]
