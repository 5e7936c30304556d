"""save_activations: the right rows, from the right modules, with the right records."""

import itertools

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saeutils.activations import model_fingerprint, save_activations
from saeutils.datasets import ImageData
from saeutils.models import MLP
from saeutils.store import ActivationStore


class Toy(nn.Module):
    """Tokens (n, T) -> embeddings (n, T, 4), a tuple, a sum; counts its calls."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 4)
        self.pair = Pair()
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)
        self.head_calls = 0

    def forward(self, tokens):
        x = self.drop(self.embed(tokens))
        x, _ = self.pair(x)
        self.head_calls += 1
        return self.head(x.sum(1))


class Pair(nn.Module):
    def forward(self, x):
        return 2 * x, "not a tensor"


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 5, stride=4)
        self.twice = nn.ReLU()

    def forward(self, x):
        return self.twice(self.twice(self.conv(x)))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return ImageData(
        images=torch.randint(256, (30, 28, 28), generator=generator).byte(),
        labels=torch.arange(30) % 10,
        ids=torch.arange(30) * 2 + 500,
        split="test",
        name="noise",
    )


def save(model, inputs, hooks, path, **options):
    return save_activations(model, inputs, hooks, path, progress=False, **options)


def tokens(n=12, length=5):
    return torch.arange(n * length).reshape(n, length) % 50


def test_an_mlp_on_images(tmp_path, images):
    model = MLP((16, 8), seed=1)
    stores = save(model, images, ["fc1", "fc2", "fc1.linear"], tmp_path, batch_size=7)
    h1 = model.fc1(images.pixels)
    torch.testing.assert_close(stores["fc1"][:], h1.detach())
    torch.testing.assert_close(stores["fc2"][:], model.fc2(h1).detach())
    assert stores["fc1.linear"][:].min() < 0 <= stores["fc1"][:].min()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fc1", "fc1.linear", "fc2"]
    records = stores["fc2"].provenance
    assert records["id"].tolist() == images.ids.tolist()
    assert records["label"].tolist() == images.labels.tolist()
    assert set(records["split"]) == {"test"}
    manifest = stores["fc1"].manifest
    assert manifest["model"] == model_fingerprint(model)
    assert (manifest["hook"], manifest["rows"], manifest["d_in"]) == ("fc1", 30, 16)


def test_positions_become_rows(tmp_path):
    model = Toy()
    x = tokens()
    store = save(model, x, "pair", tmp_path, batch_size=5, provenance={"doc": x[:, 0]})
    expected = 2 * model.embed(x).detach()
    assert torch.equal(store["pair"][:], expected.reshape(60, 4))
    records = store["pair"].provenance.to_records(index=False).tolist()
    brute = [(i, int(x[i, 0]), p, int(x[i, p])) for i in range(12) for p in range(5)]
    assert records == brute
    assert [*store["pair"].provenance] == ["id", "doc", "position", "token"]


@given(data=st.data())
def test_records_are_right_for_any_sizes(tmp_path_factory, data):
    n, length = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6))
    batch, shard = data.draw(st.integers(1, 25)), data.draw(st.integers(8, 40))
    path = tmp_path_factory.mktemp("any")
    model, x = Toy(), tokens(n, length)
    stores = save(
        model, x, ["embed", "pair"], path, batch_size=batch, shard_bytes=shard * 16
    )
    for hook, scale in (("embed", 1), ("pair", 2)):
        store = stores[hook]
        index = torch.randperm(n * length)
        rows, records = store.gather(index), store.provenance.iloc[index.numpy()]
        wanted = x[records["id"].tolist(), records["position"].tolist()]
        assert torch.equal(rows, scale * model.embed(wanted).detach())
        assert len(store) == n * length


def test_layouts_name_the_axes(tmp_path):
    model, x = Conv(), torch.randn(3, 1, 13, 9)
    wanted = model.conv(x).detach()
    with pytest.raises(ValueError, match=r"4 axes \(2, 3, 3, 2\): say what they are"):
        save(model, x, "conv", tmp_path)
    layout = {"conv": "batch d row column"}
    store = save(model, x, "conv", tmp_path / "pixels", layout=layout)["conv"]
    rows = iter(store[:])
    for i, r, c in itertools.product(range(3), range(3), range(2)):
        assert torch.equal(next(rows), wanted[i, :, r, c])
    assert [*store.provenance] == ["id", "row", "column"]
    assert store.provenance["row"].tolist() == [0, 0, 1, 1, 2, 2] * 3
    assert store.provenance["column"].tolist() == [0, 1] * 9

    layout = {"conv": "batch (d row) column"}
    store = save(model, x, "conv", tmp_path / "columns", layout=layout)["conv"]
    assert torch.equal(store[:], wanted.permute(0, 3, 1, 2).reshape(6, 9))
    assert [*store.provenance] == ["id", "column"]


@pytest.mark.parametrize(
    "text",
    [
        "batch d row",
        "d batch row column",
        "batch a b c",
        "batch d d row",
        "batch (a b) d",
    ],
)
def test_wrong_layouts(tmp_path, text):
    with pytest.raises(ValueError, match=r"layout .* for the output of 'conv'"):
        save(Conv(), torch.randn(3, 1, 13, 9), "conv", tmp_path, layout={"conv": text})
    assert not list(tmp_path.iterdir())


def test_the_mode_is_restored_and_dropout_is_off(tmp_path):
    model = Toy().train()
    store = save(model, tokens(), "drop", tmp_path)["drop"]
    assert torch.equal(store[:], model.embed(tokens()).detach().flatten(0, 1))
    assert model.training and model.drop.training
    assert not model.embed.weight.grad_fn and model.embed.weight.requires_grad
    assert not model.pair._forward_hooks


def test_the_pass_ends_at_the_last_hook(tmp_path):
    model = Toy()
    save(model, tokens(100), "pair", tmp_path, batch_size=10)
    assert model.head_calls == 1  # once whole, to see that every hook speaks once


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtypes(tmp_path, dtype):
    model = Toy()
    store = save(model, tokens(), "embed", tmp_path, dtype=dtype)["embed"]
    wanted = model.embed(tokens()).detach().flatten(0, 1)
    assert torch.equal(store[:], wanted.to(getattr(torch, dtype)).float())
    assert store.dtype == getattr(torch, dtype)


def test_a_half_precision_model(tmp_path):
    model = Toy().bfloat16()
    store = save(model, tokens(), "embed", tmp_path, dtype="bfloat16")["embed"]
    assert torch.equal(store[:], model.embed(tokens()).float().detach().flatten(0, 1))


def test_a_finished_store_is_opened_and_not_computed_again(tmp_path):
    model = Toy()
    first = save(model, tokens(), "head", tmp_path)["head"]
    calls = model.head_calls
    again = save(model, tokens(), "head", tmp_path)["head"]
    assert model.head_calls == calls + 1  # the look at shapes
    assert again.fingerprint == first.fingerprint


def test_a_hook_can_be_added_later(tmp_path):
    model = Toy()
    save(model, tokens(), "embed", tmp_path)
    both = save(model, tokens(), ["embed", "pair"], tmp_path)
    assert torch.equal(2 * both["embed"][:], both["pair"][:])


def test_the_plan_is_printed_before_the_work(tmp_path, images, capsys):
    save_activations(MLP((16, 8)), images, ["fc1", "fc2"], tmp_path, shard_bytes=640)
    out, err = capsys.readouterr()
    assert "fc1: 30 rows × 16, 0.0 MiB in 3 shard(s)" in out
    assert "in about 0 s" in out and "30/30" in err
    save(MLP((16, 8)), images, "fc1", tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")


def test_the_budget_is_kept(tmp_path, images):
    needed = 30 * 16 * 4 + 30 * 8 * 4
    with pytest.raises(ValueError, match=f"take {needed:,} bytes and the budget is"):
        save(MLP((16, 8)), images, ["fc1", "fc2"], tmp_path, budget=needed - 1)
    assert not list(tmp_path.iterdir())
    save(MLP((16, 8)), images, ["fc1", "fc2"], tmp_path, budget=needed)


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        ("fc3", r"'fc3'.*fc1, fc1\.linear"),
        (["fc1", "nonsense"], "'nonsense'"),
        ([], "no hooks"),
    ],
)
def test_wrong_hooks(tmp_path, images, hooks, message):
    with pytest.raises(ValueError, match=message):
        save(MLP((16, 8)), images, hooks, tmp_path)
    assert not list(tmp_path.iterdir())


def test_hooks_that_speak_twice_never_or_nonsense(tmp_path):
    model = Conv()
    with pytest.raises(ValueError, match="calls 'twice' 2 times"):
        save(model, torch.randn(3, 1, 13, 9), "twice", tmp_path)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="calls 'unused' 0 times"):
        save(model, torch.randn(3, 1, 13, 9), "unused", tmp_path)
    flat = nn.Sequential(nn.Linear(3, 3), nn.Flatten(0))
    with pytest.raises(ValueError, match="'1' has 1 axes"):
        save(flat, torch.randn(4, 3), "1", tmp_path)
    turned = nn.Sequential(nn.Unflatten(1, (3, 1)), Turn())
    with pytest.raises(ValueError, match="first axis must be the batch"):
        save(turned, torch.randn(4, 3), "1", tmp_path)


class Turn(nn.Module):
    def forward(self, x):
        return x.movedim(0, 1)


def test_outputs_that_the_model_changes_in_place_are_stored_unchanged(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(50, 3)
    wanted = nn.functional.linear(x, model[0].weight, model[0].bias).detach()
    stores = save(model, x, ["0", "2"], tmp_path, batch_size=8)
    torch.testing.assert_close(stores["0"][:], wanted)
    assert stores["0"][:].min() < 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": torch.zeros(0, 784)}, "n ≥ 1"),
        ({"inputs": torch.zeros(784)}, "n ≥ 1"),
        ({"inputs": [[0.0] * 784]}, "type list"),
        ({"provenance": {"kind": [1, 2]}}, r"'kind' of shape \(2,\).*30 inputs"),
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"shard_bytes": 0}, "shard_bytes 0"),
    ],
)
def test_wrong_options(tmp_path, images, monkeypatch, options, message):
    # As a user runs it: the shape checker of the tests would speak up first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=message):
        save(MLP((16, 8)), options.pop("inputs", images), "fc1", tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_wrong_input_shape_is_the_models_own_error(tmp_path):
    with pytest.raises(ValueError, match=r"\(n, 784\)"):
        save(MLP((16, 8)), torch.zeros(5, 7), "fc1", tmp_path)
    assert not list(tmp_path.iterdir())


def test_nan_images_are_refused_with_their_id(tmp_path, images):
    pixels = images.pixels
    pixels[17] = float("nan")
    with pytest.raises(ValueError, match=r"row 17 \(id=534\) .* holds nan"):
        save(MLP((8,)), pixels, "fc1", tmp_path, provenance={"id": images.ids})


def test_fingerprint_of_a_model():
    a, b = Toy(), Toy()
    b.load_state_dict(a.state_dict())
    assert model_fingerprint(a) == model_fingerprint(b)
    with torch.no_grad():
        b.head.bias[1] += 1e-6
    assert model_fingerprint(a) != model_fingerprint(b)
    c = Toy().double()
    c.load_state_dict(a.state_dict())
    assert model_fingerprint(a) != model_fingerprint(c)
    norm = nn.BatchNorm1d(3)  # has a scalar buffer
    assert len(model_fingerprint(norm)) == 64


def test_hook_names_become_safe_folder_names(tmp_path):
    model = nn.ModuleDict({"a b/c": nn.Linear(3, 2)})
    model.forward = lambda x: model["a b/c"](x)
    store = save(model, torch.randn(4, 3), "a b/c", tmp_path)["a b/c"]
    assert store.hook == "a b/c"
    assert [p.name for p in tmp_path.iterdir()] == ["a%20b%2Fc"]
    assert isinstance(ActivationStore.open(tmp_path / "a%20b%2Fc"), ActivationStore)
    assert store[:].isfinite().all()
