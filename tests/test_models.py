"""The classifiers: known answers, the shift kernel against a slow one, bad input."""

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saeutils import models
from saeutils.activations import save_activations
from saeutils.datasets import ImageData, mnist


def images(n=40, seed=0, classes=2):
    """Class c is a bright column c: separable by any working classifier."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=g)
    x = torch.randint(60, (n, 28, 28), generator=g, dtype=torch.uint8)
    x[torch.arange(n), :, 8 + 4 * labels] = 255
    return ImageData(x, labels, torch.arange(n), split="train", name="columns")


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def test_mlp_is_the_equation_of_its_docstring():
    model = models.MLP((5, 3), seed=1)
    x = torch.rand(7, 784, generator=torch.Generator().manual_seed(0))
    h = x
    for layer in (model.fc1.linear, model.fc2.linear):
        h = (h @ layer.weight.T + layer.bias).clamp(min=0)
    assert torch.equal(model(x).argmax(1), (h @ model.head.weight.T).argmax(1))
    torch.testing.assert_close(model(x), h @ model.head.weight.T + model.head.bias)


def same_weights(a, b):
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_mlp_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    a = models.MLP(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(a, models.MLP(seed=3))
    assert not same_weights(a, models.MLP(seed=4))


def slow_convolution(x, layer):
    """One output number at a time, from the zero-padded maps."""
    w, pad, step = layer.weight, layer.padding[0], layer.stride[0]
    c, h, _ = x.shape
    size = w.shape[-1]
    padded = torch.zeros(c, h + 2 * pad, h + 2 * pad)
    padded[:, pad : pad + h, pad : pad + h] = x
    out = torch.zeros(len(w), h // step, h // step)
    for i in range(h // step):
        for j in range(h // step):
            top, left = i * step, j * step
            window = padded[:, top : top + size, left : left + size]
            out[:, i, j] = (w * window).sum((1, 2, 3)) + layer.bias
    return out


@torch.no_grad()
def test_cnn_is_the_equation_of_its_docstring():
    model = models.CNN((3, 4), 5, seed=1)
    for layer in (model.conv1.conv, model.conv2.conv, model.fc1.linear):
        layer.bias.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(2))
    x = torch.rand(2, 784, generator=torch.Generator().manual_seed(0))
    want = []
    for image in x.view(2, 1, 28, 28):
        h = slow_convolution(image, model.conv1.conv).clamp(min=0)
        h = slow_convolution(h, model.conv2.conv).clamp(min=0)
        h = (model.fc1.linear.weight @ h.flatten() + model.fc1.linear.bias).clamp(0)
        want.append(model.head.weight @ h + model.head.bias)
    torch.testing.assert_close(model(x), torch.stack(want))
    with pytest.raises(ValueError, match=r"shape \(n, 784\).*got \(2, 28, 28\)"):
        model(x.view(2, 28, 28))
    with pytest.raises(ValueError, match="a unit or more, got channels \\(3, 0\\)"):
        models.CNN((3, 0))


def test_cnn_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    a = models.CNN(seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert same_weights(a, models.CNN(seed=3))
    assert not same_weights(a, models.CNN(seed=4))


def test_maps_of_a_cnn_are_stored_a_row_a_place(tmp_path):
    model, data = models.CNN((3, 4), 5), images(n=6)
    assert models.hook_point(model, "conv1") is model.conv1
    stores = save_activations(
        model,
        data,
        ["conv2", "fc1"],
        tmp_path,
        layout={"conv2": "batch d row column"},
        progress=False,
    )
    with torch.no_grad():
        maps = model.conv2(model.conv1(data.pixels.view(-1, 1, 28, 28)))
    got = stores["conv2"][0 : 6 * 49].view(6, 7, 7, 4)
    torch.testing.assert_close(got, maps.permute(0, 2, 3, 1))
    torch.testing.assert_close(stores["fc1"][0:6], model.fc1(maps).detach())


def test_hook_points_are_named_and_a_wrong_name_lists_them():
    model = models.MLP((8, 4))
    assert models.hook_point(model, "fc2") is model.fc2
    with pytest.raises(ValueError, match=r"no hook point 'fc3'.*fc1.linear.*head"):
        models.hook_point(model, "fc3")


@given(st.integers(0, 3), st.integers(0, 2**20))
def test_shift_equals_the_slow_obvious_one(shift, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (4, 28, 28), generator=g, dtype=torch.uint8)
    index = torch.randint(4, (6,), generator=g)
    offset = torch.randint(2 * shift + 1, (2, 6), generator=g)
    got = models._shifter(x, shift)(index, offset)
    for i, image in enumerate(index):
        padded = torch.zeros(28 + 2 * shift, 28 + 2 * shift)
        padded[shift : shift + 28, shift : shift + 28] = x[image] / 255
        top, left = offset[:, i]
        want = padded[top : top + 28, left : left + 28]
        torch.testing.assert_close(got[i], want.flatten())


def test_evaluate_known_answer_and_the_same_for_every_batch_size():
    model = models.MLP((4,))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.head.bias[3] = 2.0
    labels = torch.tensor([3, 3, 3, 1])
    x = torch.rand(4, 784)
    log_z = torch.tensor([2.0] + [0.0] * 9).logsumexp(0).item()
    for size in (1, 3, 100):
        accuracy, nats = models.evaluate(model, (x, labels), batch_size=size)
        assert accuracy == 0.75
        assert nats == pytest.approx(log_z - 0.75 * 2.0, rel=1e-6)


def test_activations_in_memory_are_those_of_the_layer():
    model, data = models.MLP((4, 3)), images()
    for size in (7, 2048):
        got = models.activations_at(model, "fc2", data, batch_size=size)
        torch.testing.assert_close(got, model.fc2(model.fc1(data.pixels)).detach())
    assert not got.requires_grad and not model.fc2._forward_hooks
    with pytest.raises(ValueError, match="no hook point 'fc3'"):
        models.activations_at(model, "fc3", data)


def test_evaluate_leaves_the_mode_as_it_was():
    for mode in (True, False):
        model = models.MLP((4,)).train(mode)
        models.evaluate(model, images())
        assert model.training is mode


def test_training_learns_and_repeats_exactly():
    data, test = images(seed=0), images(seed=1)
    runs = []
    for _ in range(2):
        model = models.MLP((16, 8), seed=0)
        history = models.train_classifier(
            model, data, epochs=12, batch_size=7, shift=1, test=test, progress=False
        )
        runs.append((model, history))
    (a, history), (b, again) = runs
    assert same_weights(a, b)
    assert list(history.epoch) == list(range(1, 13))
    assert history.loss.equals(again.loss)
    assert history.loss.iloc[-1] < history.loss.iloc[0] / 2
    assert history.test_accuracy.iloc[-1] > 0.9
    assert models.evaluate(a, test).accuracy == history.test_accuracy.iloc[-1]


@pytest.mark.parametrize(
    "model, epochs, lr, least",
    [
        (models.MLP((128, 64)), 6, 4e-3, 0.978),
        (models.MLP((512, 256)), 6, 3e-3, 0.985),
        (models.CNN(), 4, 4e-3, 0.985),
    ],
    ids=["small", "large", "CNN"],
)
def test_real_digits_reach_the_promised_accuracy(model, epochs, lr, least):
    models.train_classifier(
        model, mnist("train"), epochs=epochs, lr=lr, shift=1, progress=False
    )
    assert models.evaluate(model, mnist("test")).accuracy >= least


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(epochs=0), "epochs must be at least 1"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(shift=-1), "shift must be at least 0"),
        (dict(lr=0.0), "lr must be positive"),
        (dict(lr=float("nan")), "lr must be positive"),
    ],
)
def test_bad_training_numbers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        models.train_classifier(models.MLP((4,)), images(), **change)


def test_bad_labels_are_refused_before_any_step():
    data = images(classes=4)
    model = models.MLP((4,), n_classes=3)
    before = model.head.weight.clone()
    with pytest.raises(ValueError, match=r"from 0 to 3, but the model has 3 classes"):
        models.train_classifier(model, data, progress=False)
    assert torch.equal(model.head.weight, before)


def test_bad_data_are_refused(unchecked):
    model, x, y = (
        models.MLP((4,)),
        torch.rand(5, 784),
        torch.zeros(5, dtype=torch.int64),
    )
    with pytest.raises(ValueError, match="5 inputs but 4 labels"):
        models.evaluate(model, (x, y[:4]))
    with pytest.raises(ValueError, match="the data are empty"):
        models.evaluate(model, (x[:0], y[:0]))
    x[3, 7] = float("nan")
    with pytest.raises(ValueError, match="input 3 contains NaN"):
        models.evaluate(model, (x, y), batch_size=2)
    with pytest.raises(ValueError, match=r"shape \(n, 784\).*got \(5, 28, 28\)"):
        model(torch.rand(5, 28, 28))


def test_a_loss_that_explodes_says_so():
    with pytest.raises(ValueError, match="lower lr"):
        models.train_classifier(
            models.MLP((4,)), images(), epochs=3, lr=1e38, progress=False
        )


def test_any_module_can_be_the_subject():
    model = nn.Sequential(nn.Linear(784, 6), nn.Tanh(), nn.Linear(6, 2))
    history = models.train_classifier(model, images(), epochs=1, progress=False)
    assert len(history) == 1


def test_each_module_gets_its_own_mode_back():
    model = models.MLP((8, 4))
    model.train()
    model.fc1.eval()  # frozen by its user
    with models.evaluation_mode(model):
        assert not any(module.training for module in model.modules())
    assert model.training and model.fc2.training and not model.fc1.training
