"""Ascent finds what algebra says it must; the measures know a picture from noise."""

import math
from dataclasses import replace

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from saeutils import canvas, inversion, pictures, readouts
from saeutils.datasets import ImageData
from saeutils.inversion import METHODS, Method
from saeutils.sae import export, initial_params


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def data():
    """Smooth images of 8 × 8: few strong principal components, as real ones have."""
    x = F.interpolate(normal(300, 1, 4, 4), (8, 8), mode="bilinear")[:, 0]
    images = (x * 60 + 100).clamp(0, 255).to(torch.uint8)
    return ImageData(images, torch.arange(300) % 3, torch.arange(300) + 7, "t", "blur")


@pytest.fixture(scope="module")
def stats(data):
    return pictures.image_stats(data, 20)


def linear(d=64, units=5, seed=1):
    """layer "0" is linear: its units ask for sign(w) in a box."""
    model = nn.Sequential(nn.Linear(d, units), nn.ReLU(), nn.Linear(units, 3))
    with torch.no_grad():
        model[0].weight.copy_(normal(units, d, seed=seed))
        model[0].bias.copy_(normal(units, seed=seed + 1))
    return model.requires_grad_(False)


# --- readouts -------------------------------------------------------------------


@pytest.mark.parametrize("centred", [True, False])
def test_latents_are_the_encoder_where_it_fires(centred):
    model, b_dec = linear(), normal(5, seed=4)
    params = initial_params("batchtopk", 9, b_dec, seed=2)
    params["b_enc"] += 0.1
    sae = export(params, "batchtopk", threshold=0.3, pre_encoder_bias=centred)
    read = readouts.latents(model, "1", sae)
    x = normal(40, 64).abs()
    pre, logits = read(x)
    z = sae.encode(model[1](model[0](x)))
    fires = pre > read.threshold
    assert torch.equal(fires, z > 0) and fires.any()
    assert torch.allclose(pre[fires], z[fires], atol=1e-5)
    assert torch.equal(logits, model(x))


def test_directions_and_neurons():
    model, x = linear(), normal(6, 64)
    rows, centre = 3 * normal(4, 5), normal(5, seed=8)
    pre, _ = readouts.directions(model, "0", rows, centre)(x)
    want = (model[0](x) - centre) @ F.normalize(rows, dim=1).T
    assert torch.allclose(pre, want, atol=1e-5)
    pre, _ = readouts.neurons(model, "0", 5)(x)
    assert torch.equal(pre, model[0](x))


def test_the_strongest_images_are_those_of_a_slow_search(data):
    model = linear()
    model[0].bias[3] = -1e4
    read = readouts.neurons(model, "0", 5)
    found = readouts.strongest(read, data, 4)
    pre = model[0](data.pixels)
    want = pre.topk(4, dim=0)
    assert torch.allclose(found.values, want.values.T, atol=1e-5)
    assert torch.equal(found.index, want.indices.T)
    assert torch.allclose(found.maxima, pre.amax(0).clamp(min=0), atol=1e-5)
    assert found.maxima[3] == 0
    labels = torch.zeros(300).long()
    labels[found.index[2, 1:]] = 8  # three of four
    assert found.majority(labels)[2] == 8
    with pytest.raises(ValueError, match=r"1\.\.300"):
        readouts.strongest(read, data, 301)


def test_strongest_goes_on_over_batches():
    """More images than one batch holds."""
    n = 5000
    images = (torch.arange(n * 4).reshape(n, 2, 2) * 7919 % 256).to(torch.uint8)
    big = ImageData(images, torch.zeros(n).long(), torch.arange(n), "t", "many")
    model = linear(d=4)
    found = readouts.strongest(readouts.neurons(model, "0", 5), big, 3)
    want = model[0](big.pixels).topk(3, dim=0).values.T
    assert torch.allclose(found.values, want, atol=1e-5)


# --- ascent ---------------------------------------------------------------------


def test_in_a_box_a_linear_unit_asks_for_the_sign_of_its_weights(stats):
    model = linear()
    read = readouts.neurons(model, "0", 5)
    found = inversion.maximise(read, [0, 3], torch.ones(5), stats, Method(), seeds=2)
    for i, unit in enumerate((0, 3)):
        want = (model[0].weight[unit] > 0).float()
        assert torch.allclose(found.images[i], want.expand(2, -1))
        score = model[0](want)[unit].item()
        assert found.score[i].tolist() == pytest.approx([score] * 2, rel=1e-5)


def test_the_prior_gives_the_closed_form(stats):
    """argmax s·c − (β / d) ‖c‖² is c = d s / 2β, s the slope along each component."""
    model, beta = linear(), 2.0
    read = readouts.neurons(model, "0", 5)
    method = Method("pca", prior=beta, box=False, steps=600, lr=0.1)
    maxima = torch.full((5,), 7.0)
    found = inversion.maximise(read, [2], maxima, stats, method, seeds=2).images[0]
    slope = stats.axes @ model[0].weight[2] * stats.sd / 7
    want = stats.mean + len(slope) * slope / (2 * beta) * stats.sd @ stats.axes
    assert torch.allclose(found, want.expand(2, -1), atol=1e-3)


def test_the_other_units_can_be_kept_silent(stats):
    model = linear()
    model[0].weight[1] = model[0].weight[0] + 0.3 * normal(64)  # nearly the same unit
    read = readouts.neurons(model, "0", 5)
    maxima = torch.full((5,), 10.0)
    free, alone = (
        inversion.maximise(read, [0], maxima, stats, Method(off_target=w))
        for w in (0.0, 1.0)
    )
    measured = [
        inversion.measure(f.images[0], torch.zeros(3).long(), read, maxima, stats)
        for f in (free, alone)
    ]
    assert (measured[1].active < measured[0].active).all()
    assert (measured[1].ratio < measured[0].ratio).all() and (alone.score > 0).all()


@pytest.mark.parametrize("optimiser", canvas.OPTIMISERS)
def test_all_optimisers_climb_to_the_same_place(stats, optimiser):
    read = readouts.neurons(linear(), "0", 5)
    method = Method("pca", prior=2, box=False, steps=400, lr=0.02, optimiser=optimiser)
    maxima = torch.full((5,), 7.0)
    found = inversion.maximise(read, [2], maxima, stats, method, seeds=1).images[0]
    best = inversion.maximise(
        read, [2], maxima, stats, replace(method, optimiser="adam", steps=2000), seeds=1
    ).images[0]
    assert F.cosine_similarity(found, best).item() > 0.99


def test_a_layer_that_loses_nothing_is_inverted_exactly(stats, data):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 2)).requires_grad_(False)
    model[0].weight.copy_(torch.linalg.qr(normal(64, 64)).Q)
    x = data.pixels[:4]
    found = inversion.invert(model, "0", model[0](x), stats, Method(steps=300))
    assert torch.allclose(found, x, atol=0.02)


def test_phases_keep_the_spectrum(stats):
    read = readouts.neurons(linear(), "0", 5)
    method = replace(METHODS["spectrum phases"], box=False, steps=20)
    images = inversion.maximise(read, [1], torch.ones(5), stats, method).images[0]
    found = torch.fft.rfft2(images.view(-1, 8, 8)).abs()
    assert torch.allclose(
        found, stats.amplitude.expand(3, -1, -1), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("name", METHODS)
def test_every_method_climbs_and_repeats(stats, name):
    model = linear()
    read = readouts.neurons(model, "0", 5)
    method = replace(METHODS[name], steps=30)
    maxima = torch.full((5,), 5.0)
    first, again = (
        inversion.maximise(read, [0, 4], maxima, stats, method) for _ in range(2)
    )
    start = inversion.maximise(
        read, [0, 4], maxima, stats, replace(method, steps=1, lr=1e-6)
    )
    assert first.images.shape == (2, 3, 64)
    assert torch.equal(first.images, again.images)
    assert first.score.mean() > start.score.mean() + 0.1
    assert not method.box or (first.images.min() >= 0 and first.images.max() <= 1)
    assert all(p.grad is None for p in model.parameters())


def test_dead_units_and_bad_methods_are_refused(stats, unchecked):
    read = readouts.neurons(linear(), "0", 5)
    maxima = torch.tensor([1.0, 0, 1, 0, 1])
    with pytest.raises(ValueError, match=r"units \[1, 3\] never fire"):
        inversion.maximise(read, [0, 1, 3], maxima, stats, Method())
    with pytest.raises(ValueError, match="no units"):
        inversion.maximise(read, [], maxima, stats, Method())
    with pytest.raises(ValueError, match="never calls"):
        readouts.run(Unused(), "spare", normal(1, 64))
    for bad in (dict(space="wavelet"), dict(optimiser="lion"), dict(tv=-1), dict(lr=0)):
        with pytest.raises(ValueError, match=r"one of|must not|needs"):
            Method(**bad)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(64, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


# --- measures -------------------------------------------------------------------


def test_coordinates_of_real_images_have_unit_variance(stats, data):
    c = stats.coordinates(data.pixels)
    assert torch.allclose(c.mean(0), torch.zeros(20), atol=1e-3)
    assert torch.allclose(c.square().mean(0), torch.ones(20), atol=1e-2)
    spectrum = torch.fft.rfft2(data.images.float() / 255).abs().mean(0)
    assert torch.allclose(stats.amplitude, spectrum, atol=1e-3)
    assert len(pictures.image_stats(data, 1000).sd) <= 64
    with pytest.raises(ValueError, match="at least 1, got 0"):
        pictures.image_stats(data, 0)


def test_high_frequency_of_waves():
    t = torch.arange(8)
    slow, fast = (torch.cos(2 * math.pi * f * t / 8).expand(8, 8) for f in (1, 3))
    waves = torch.stack([slow, fast, slow + fast, slow + 5, torch.ones(8, 8)]).flatten(
        1
    )
    found = pictures.high_frequency(waves, (8, 8))
    assert found.tolist() == pytest.approx([0, 1, 0.5, 0, 0], abs=1e-5)


def test_nearest_cosine_is_the_slow_search(data):
    x = normal(5, 64).abs()
    want = F.cosine_similarity(x[:, None], data.pixels[None], dim=2).amax(1)
    assert torch.allclose(pictures.nearest_cosine(x, data), want, atol=1e-5)
    own = data.pixels[:3]
    assert pictures.nearest_cosine(own, data).tolist() == pytest.approx([1] * 3)
    apart = pictures.nearest_cosine(own, data, without=data.ids[:3])
    cosine = F.cosine_similarity(own[:, None], data.pixels[None], dim=2)
    cosine[range(3), range(3)] = -1
    assert torch.allclose(apart, cosine.amax(1), atol=1e-5)


def test_displayable_leaves_pictures_alone():
    x = torch.tensor([[0.0, 0.5, 1], [-2, 0, 1]])
    assert pictures.displayable(x).tolist() == [[0, 0.5, 1], [0, 0.5, 0.75]]


def test_stability_is_the_mean_over_pairs():
    x = normal(3, 4, 10)
    same, other = [], []
    for i in range(12):
        for j in range(i):
            pair = F.cosine_similarity(x[i // 4, i % 4], x[j // 4, j % 4], dim=0)
            (same if i // 4 == j // 4 else other).append(pair.item())
    want = sum(same) / len(same), sum(other) / len(other)
    assert pictures.stability(x) == pytest.approx(want, abs=1e-5)
    assert math.isnan(pictures.stability(x[:, :1])[0])


def test_the_table_has_a_row_for_each_method_and_one_for_real_images(stats, data):
    model = linear()
    read = readouts.neurons(model, "0", 5)
    known = readouts.strongest(read, data)
    methods = {"a": Method(steps=5), "b": Method("pca", prior=1.0, steps=5)}
    units = (known.maxima > 0).nonzero().flatten()[:2]
    frame, images = inversion.compare(read, units, known, stats, methods, seeds=2)
    assert list(frame["name"]) == list(images) == ["best real image", "a", "b"]
    assert frame["× data's maximum"][0] == pytest.approx(1)
    assert frame["nearest real image"][0] < 1  # itself does not count
    wanted = known.majority(data.labels)[units].repeat_interleave(2)
    agrees = (model(images["a"].flatten(0, 1)).argmax(1) == wanted).float().mean()
    assert frame["class agreement"][1] == pytest.approx(agrees.item())
    each = units.repeat_interleave(2)
    pre = model[0](images["b"].flatten(0, 1)).gather(1, each[:, None])[:, 0]
    ratio = (pre / known.maxima[each]).median().item()
    assert frame["× data's maximum"][2] == pytest.approx(ratio)


def test_rebuild_compares_sources_and_methods(stats, data):
    model, x = linear(units=64), data.pixels[:4]
    model[0].weight.copy_(torch.linalg.qr(normal(64, 64)).Q)
    acts = model[0](x)
    targets = {"all": ("0", acts), "nothing": ("0", torch.ones_like(acts))}
    ways = {"long": Method(steps=300), "short": Method(steps=1)}
    table, images = inversion.rebuild(model, x, targets, stats, ways)
    assert images["all"].shape == (4, 2, 64)
    assert table["all"]["long"] > 0.999 > table["all"]["short"]
    assert table["nothing"]["long"] < 0.9
