"""What other tools saved: the same rows, with the right records."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saeutils.importers
from saeutils.importers import import_matrix, import_sae_lens, import_saev
from saeutils.store_writer import StoreWriter

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(saeutils.importers, "PART_BYTES", 7 * 5 * 4)


def write(path, x=X):
    if path.suffix == ".npy":
        np.save(path, x.float().numpy())
    elif path.suffix == ".safetensors":
        save_file({"acts": x}, path)
    else:
        torch.save({"acts": x, "note": 3} if path.stem == "dict" else x, path)
    return path


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors", "a.pt", "dict.pth"])
def test_a_matrix(tmp_path, name):
    source = write(tmp_path / name)
    labels = np.arange(60) % 3
    store = import_matrix(source, tmp_path / "store", provenance={"label": labels})
    assert torch.equal(store[:], X)
    assert store.provenance["id"].tolist() == list(range(60))
    assert store.provenance["label"].tolist() == labels.tolist()
    assert store.manifest["dtype"] == "float32"
    store.verify()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pt"])
def test_half_precision_is_kept(tmp_path, name):
    source = write(tmp_path / name, X.bfloat16())
    store = import_matrix(source, tmp_path / "store")
    assert store.dtype == torch.bfloat16
    assert torch.equal(store[:], X.bfloat16().float())


def test_an_interrupted_import_goes_on(tmp_path, monkeypatch):
    source = write(tmp_path / "a.npy")
    monkeypatch.setattr(saeutils.store_writer, "SHARD_BYTES", 11 * 5 * 4)
    real, calls = StoreWriter.append, 0

    def append(self, *arguments):
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StoreWriter, "append", append)
        with pytest.raises(KeyboardInterrupt):
            import_matrix(source, tmp_path / "store")
    store = import_matrix(source, tmp_path / "store")
    assert torch.equal(store[:], X)
    assert store.provenance["id"].tolist() == list(range(60))
    write(source, X + 1)
    with pytest.raises(ValueError, match="something else: the data"):
        import_matrix(source, tmp_path / "store")


def test_wrong_matrices(tmp_path):
    source = tmp_path / "two.safetensors"
    save_file({"a": X, "b": X.clone()}, source)
    with pytest.raises(ValueError, match=r"key None: .* holds a, b"):
        import_matrix(source, tmp_path / "s")
    assert len(import_matrix(source, tmp_path / "b", key="b")) == 60
    with pytest.raises(ValueError, match=r"\(60, 5, 1\): expected \(n, d\)"):
        import_matrix(write(tmp_path / "a.npy", X[..., None]), tmp_path / "s")
    with pytest.raises(ValueError, match="59 values of 'label' for 60 rows"):
        labels = {"label": [0] * 59}
        import_matrix(write(tmp_path / "a.npy"), tmp_path / "s", provenance=labels)
    with pytest.raises(ValueError, match=r"expected an \.npy"):
        import_matrix(tmp_path / "a.csv", tmp_path / "s")
    bad = X.clone()
    bad[33, 2] = float("nan")
    with pytest.raises(ValueError, match=r"row 33 \(id=33\)"):
        import_matrix(write(tmp_path / "nan.npy", bad), tmp_path / "nan")
    assert not (tmp_path / "s").exists()


def test_a_pt_file_that_would_run_code_is_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        import_matrix(tmp_path / "evil.pt", tmp_path / "s")


def test_rows_that_sae_lens_cached(tmp_path):
    from datasets import Array2D, Dataset, Features, Sequence, Value

    acts, tokens = X.reshape(12, 5, 5), torch.arange(60).reshape(12, 5)
    features = Features(
        {
            "blocks.0.hook_mlp_out": Array2D(shape=(5, 5), dtype="float32"),
            "token_ids": Sequence(Value(dtype="int32"), length=5),
        }
    )
    content = {"blocks.0.hook_mlp_out": acts, "token_ids": tokens}
    Dataset.from_dict(content, features=features).save_to_disk(tmp_path / "cached")
    store = import_sae_lens(tmp_path / "cached", tmp_path / "store")
    assert store.hook == "blocks.0.hook_mlp_out"
    assert torch.equal(store[:], X)
    assert store.provenance["id"].tolist() == [i for i in range(12) for _ in range(5)]
    assert store.provenance["position"].tolist() == list(range(5)) * 12
    assert store.provenance["token"].tolist() == list(range(60))
    with pytest.raises(ValueError, match=r"'x': .* holds blocks\.0"):
        import_sae_lens(tmp_path / "cached", tmp_path / "other", hook="x")


@pytest.mark.parametrize("protocol", [1, 2])
def test_shards_of_saev(tmp_path, protocol):
    folder = tmp_path / "saev"
    folder.mkdir()
    acts = torch.randn(9, 2, 4, 5)  # image, layer, CLS and three patches, d
    names = {"patches_per_ex": 3, "d_model": 5, "n_ex": 9}
    if protocol == 1:
        names = {"n_patches_per_img": 3, "d_vit": 5, "n_imgs": 9}
    metadata = {**names, "layers": [7, 11], "cls_token": True, "dtype": "float32"}
    (folder / "metadata.json").write_text(json.dumps(metadata))
    count = "n_imgs" if protocol == 1 else "n_ex"
    shards = [
        {"name": "acts000000.bin", count: 6},
        {"name": "acts000001.bin", count: 3},
    ]
    (folder / "shards.json").write_text(json.dumps(shards))
    acts[:6].numpy().tofile(folder / "acts000000.bin")
    acts[6:].numpy().tofile(folder / "acts000001.bin")

    store = import_saev(folder, tmp_path / "store", layer=11)
    assert torch.equal(store[:], acts[:, 1].reshape(-1, 5))
    assert store.provenance["id"].tolist() == [i for i in range(9) for _ in range(4)]
    assert store.provenance["position"].tolist() == list(range(4)) * 9
    with pytest.raises(ValueError, match=r"layer 3: .* holds \[7, 11\]"):
        import_saev(folder, tmp_path / "other", layer=3)
    (folder / "acts000001.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"acts000001\.bin has 5 bytes, not 480"):
        import_saev(folder, tmp_path / "other", layer=7)
