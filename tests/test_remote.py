"""Stores at URLs: in memory, and on a local server that speaks S3."""

import pickle
import uuid

import numpy as np
import pytest
import torch
from torch import nn

from saeutils.activations import save_activations
from saeutils.codes import CodeStore, encode
from saeutils.store import ActivationStore, StoreWriter


@pytest.fixture(scope="module")
def s3_server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def url(request, monkeypatch):
    name = uuid.uuid4().hex
    if request.param == "memory":
        return f"memory://{name}"
    endpoint = request.getfixturevalue("s3_server")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}/stores"


class Sae:
    W_dec = torch.eye(4)

    def encode(self, x):
        return x.relu()


def save(url, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU())
    x = torch.randn(90, 5)
    return save_activations(
        model, x, "0", url, shard_bytes=20 * 16, progress=False, **options
    )["0"]


def test_written_read_verified_and_resumed(url, tmp_path):
    there, here = save(url), save(tmp_path)
    there.verify()
    assert there.fingerprint == here.fingerprint
    assert torch.equal(there[10:70], here[10:70])
    assert torch.equal(there.gather([80, 0, 41]), here.gather([80, 0, 41]))
    assert there.provenance.equals(here.provenance)
    for a, b in zip(there.batches(7), here.batches(7), strict=True):
        assert torch.equal(a.rows, b.rows)
    assert save(url).fingerprint == here.fingerprint  # opened, not written again
    with pytest.raises(ValueError, match="something else"):
        save(url, dtype="float16")
    again = pickle.loads(pickle.dumps(ActivationStore.open(url)))  # one store inside
    assert torch.equal(again[:], here[:])
    with pytest.raises(FileNotFoundError, match="no store"):
        ActivationStore.open(f"{url}/nowhere")


def test_an_interrupted_writer_goes_on(url):
    rows = torch.randn(50, 3)
    options = {"hook": "x", "d_in": 3, "expected_rows": 50, "rows_per_shard": 8}
    with pytest.raises(KeyError), StoreWriter(url, **options) as writer:
        writer.append(rows[:30], {"id": np.arange(30)})
        raise KeyError
    with StoreWriter(url, **options) as writer:
        assert writer.rows_done == 24
        writer.append(rows[24:], {"id": np.arange(24, 50)})
    store = ActivationStore.open(url)
    assert torch.equal(store[:], rows)
    assert store.provenance["id"].tolist() == list(range(50))


def test_damage_is_found(url):
    import fsspec

    store = save(url)
    fs, root = fsspec.url_to_fs(str(store.folder))
    content = bytearray(fs.cat_file(f"{root}/00002.npy"))
    content[-1] ^= 1
    fs.pipe_file(f"{root}/00002.npy", bytes(content))
    with pytest.raises(ValueError, match=r"00002\.npy is damaged"):
        ActivationStore.open(url).verify()
    fs.pipe_file(f"{root}/00002.npy", bytes(content[:-9]))
    with pytest.raises(ValueError, match=r"00002\.npy is truncated"):
        ActivationStore.open(url)
    fs.rm_file(f"{root}/00002.npy")
    fs.invalidate_cache()
    with pytest.raises(ValueError, match=r"00002\.npy is missing"):
        ActivationStore.open(url)


def test_codes(url):
    store = save(url)
    codes = encode(Sae(), store, f"{url}/codes", progress=False)
    wanted = store[:].relu()
    assert torch.equal(codes[:].dense(4), wanted)
    rows, values = CodeStore.open(f"{url}/codes").column(2)
    assert torch.equal(values, wanted[rows, 2])
