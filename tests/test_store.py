"""The store: what is written comes back, with its provenance, in the order asked."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeutils.store import (
    ActivationStore,
    Batch,
    StoreWriter,
    TensorStore,
    as_store,
)

DTYPES = ["float32", "float16", "bfloat16"]


def make(path, n=100, d=6, parts=(100,), **options):
    """A store of n known rows, appended in parts; returns rows and provenance."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n + d))
    frame = pd.DataFrame(
        {
            "id": np.arange(n) * 7 + 3,
            "label": np.arange(n) % 10,
            "split": np.where(np.arange(n) % 3 == 0, "test", "train"),
        }
    )
    with StoreWriter(path, hook="fc1", d_in=d, **options) as writer:
        at = 0
        for size in [*parts, n]:
            part = frame[at : at + size]
            columns = {name: part[name].tolist() for name in part}
            if len(part):
                writer.append(rows[at : at + size], columns)
            at += size
    return rows, frame


@pytest.fixture
def store(tmp_path):
    rows, frame = make(tmp_path / "s", rows_per_shard=32)
    opened = ActivationStore.open(tmp_path / "s")
    return opened, rows, frame


def test_rows_and_provenance_come_back(store):
    opened, rows, frame = store
    assert (len(opened), opened.d_in, opened.hook) == (100, 6, "fc1")
    assert [s["rows"] for s in opened.manifest["shards"]] == [32, 32, 32, 4]
    assert torch.equal(opened[:], rows)
    assert opened.provenance.astype({"split": str}).equals(frame)
    assert opened.provenance["split"].dtype == "category"
    opened.verify()


@given(data=st.data())
def test_any_sizes(tmp_path_factory, data):
    n, d = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 9))
    parts = data.draw(st.lists(st.integers(1, 30), max_size=5))
    shard = data.draw(st.integers(1, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    expected_rows = data.draw(st.sampled_from([None, n]))
    path = tmp_path_factory.mktemp("any")
    rows, frame = make(
        path,
        n,
        d,
        parts,
        rows_per_shard=shard,
        dtype=dtype,
        expected_rows=expected_rows,
    )
    opened = ActivationStore.open(path)
    opened.verify()
    kept = rows.to(getattr(torch, dtype)).float()
    assert torch.equal(opened[:], kept)
    assert opened.provenance.astype({"split": str}).equals(frame)
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    records = opened.records(start, stop).astype({"split": str})
    assert records.to_dict("list") == frame[start:stop].to_dict("list")
    assert records.index.tolist() == list(range(start, stop))
    index = data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n))
    assert torch.equal(opened.gather(index), kept[torch.tensor(index, dtype=int)])
    i, j = data.draw(st.integers(-n, n)), data.draw(st.integers(-n, n))
    assert torch.equal(opened[i:j], kept[i:j])
    size = data.draw(st.integers(1, n + 3))
    chunks = list(opened.chunks(size))
    assert torch.equal(torch.cat([c.rows for c in chunks]), kept)
    assert torch.cat([c.index for c in chunks]).tolist() == list(range(n))
    assert [len(c.rows) for c in chunks[:-1]] == [size] * (len(chunks) - 1)


@given(data=st.data())
def test_one_epoch_visits_each_row_once_over_all_ranks(data):
    n, batch = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 12))
    world, seed = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 99))
    store = TensorStore(torch.arange(n, dtype=torch.float32)[:, None])
    seen = []
    for rank in range(world):
        for rows, index in store.batches(
            batch, seed=seed, rank=rank, world_size=world, workers=0
        ):
            assert rows[:, 0].tolist() == index.tolist()
            seen += index.tolist()
    assert sorted(seen) == list(range(n))


@given(data=st.data())
def test_the_order_is_the_same_for_any_resume_ranks_and_workers(data):
    n, batch = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 12))
    world, steps = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 9))
    start = data.draw(st.integers(0, steps))
    workers = data.draw(st.integers(0, 3))
    seed = data.draw(st.integers(0, 9))
    options = {"shuffle": data.draw(st.sampled_from(["full", "buffer"]))}
    options |= {"block": data.draw(st.integers(1, 9)), "blocks": 3}
    store = TensorStore(torch.randn(n, 2))
    # The reference: one reader, from the start, reading when asked.
    flat = [
        i
        for b in store.batches(
            batch, seed=seed, steps=steps * world, workers=0, **options
        )
        for i in b.index.tolist()
    ]
    assert len(flat) == steps * world * batch
    for rank in range(world):
        got = store.batches(
            batch,
            seed=seed,
            steps=steps,
            start=start,
            rank=rank,
            world_size=world,
            workers=workers,
            **options,
        )
        for s, (rows, index) in enumerate(got, start=start):
            at = (s * world + rank) * batch
            assert index.tolist() == flat[at : at + batch]
            assert torch.equal(rows, store.rows[index])


def test_epochs_follow_one_another_without_a_seam(store):
    opened, rows, _ = store
    index = torch.cat([b.index for b in opened.batches(32, seed=5, steps=10)])
    for epoch in range(3):
        assert sorted(index[epoch * 100 : epoch * 100 + 100].tolist()) == [*range(100)]
    assert index[:100].tolist() != index[100:200].tolist()
    last = list(opened.batches(32))[-1]
    assert len(last.rows) == 4 and torch.equal(last.rows, rows[last.index])


def test_a_tensor_and_a_store_give_the_same_batches(store):
    opened, rows, _ = store
    for a, b in zip(
        opened.batches(7, seed=1, steps=40),
        as_store(rows).batches(7, seed=1, steps=40),
        strict=True,
    ):
        assert torch.equal(a.rows, b.rows) and torch.equal(a.index, b.index)


def test_stopping_early_stops_the_reading_threads(store):
    import threading

    opened, *_ = store
    before = threading.active_count()
    reader = opened.batches(4, steps=10**9, workers=2)
    assert isinstance(next(reader), Batch)
    assert threading.active_count() > before
    reader.close()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and "ThreadPool" in thread.name:
            thread.join(5)
    assert threading.active_count() <= before


def test_resuming_far_ahead_costs_nothing(store):
    opened, rows, _ = store
    batch = next(opened.batches(8, steps=10**15 + 1, start=10**15, workers=0))
    assert torch.equal(batch.rows, rows[batch.index])


@pytest.mark.parametrize("index", [[0, 100], [-1], np.array([10**12])])
def test_rows_that_are_not_there(store, index):
    opened, rows, _ = store
    for source in (opened, TensorStore(rows)):
        with pytest.raises(IndexError, match="100 rows"):
            source.gather(index)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0},
        {"rank": 1},
        {"rank": -1},
        {"world_size": 0},
        {"start": -1},
        {"steps": -1},
        {"workers": -1},
        {"shuffle": "none"},
        {"block": 0, "shuffle": "buffer"},
    ],
)
def test_wrong_reading_options_are_refused_at_once(store, wrong):
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        store[0].batches(**{"batch_size": 4, **wrong})


def test_slices_with_a_step_are_refused(store):
    with pytest.raises(ValueError, match="gather"):
        store[0][::2]


def test_fingerprint_sees_rows_and_provenance(tmp_path):
    make(tmp_path / "a")
    make(tmp_path / "b")
    rows, frame = make(tmp_path / "c", n=99)
    prints = [ActivationStore.open(tmp_path / x).fingerprint for x in "abc"]
    assert prints[0] == prints[1] != prints[2]
    with StoreWriter(tmp_path / "d", hook="fc1", d_in=6) as writer:
        writer.append(rows, {"id": frame["id"].to_numpy() + 1})
    with StoreWriter(tmp_path / "e", hook="fc1", d_in=6) as writer:
        writer.append(rows, {"id": frame["id"].to_numpy()})
    d, e = (ActivationStore.open(tmp_path / x).fingerprint for x in "de")
    assert d != e
    a, b = TensorStore(rows), TensorStore(rows, frame)
    assert len({a.fingerprint, b.fingerprint, TensorStore(rows + 1).fingerprint}) == 3


def test_a_store_without_provenance(tmp_path):
    with StoreWriter(tmp_path, hook="x", d_in=2) as writer:
        writer.append(torch.ones(3, 2))
    opened = ActivationStore.open(tmp_path)
    assert opened.provenance.shape == (3, 0)
    assert not list(tmp_path.glob("*.parquet"))


def test_a_store_travels_to_another_process_and_another_folder(store, tmp_path):
    opened, rows, _ = store
    assert torch.equal(pickle.loads(pickle.dumps(opened))[:], rows)
    (tmp_path / "s").rename(tmp_path / "elsewhere with spaces")
    moved = ActivationStore.open(tmp_path / "elsewhere with spaces")
    moved.verify()
    assert torch.equal(moved[:], rows) and moved.fingerprint == opened.fingerprint


def test_the_files_are_what_the_format_says(store, tmp_path):
    """Read a store with numpy and pandas alone, as the format notes describe it."""
    _, rows, frame = store
    manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
    arrays = [
        np.load(tmp_path / "s" / s["files"]["rows"]["file"]) for s in manifest["shards"]
    ]
    tables = [
        pd.read_parquet(tmp_path / "s" / s["files"]["provenance"]["file"])
        for s in manifest["shards"]
    ]
    assert (np.concatenate(arrays) == rows.numpy()).all()
    assert arrays[0].dtype.str == "<f4"
    assert pd.concat(tables, ignore_index=True).equals(frame)
    assert manifest["columns"] == {"id": "int64", "label": "int64", "split": "string"}
    assert not any(str(tmp_path) in str(value) for value in manifest.values())


def test_bfloat16_is_the_upper_half_of_float32(tmp_path):
    rows, _ = make(tmp_path, dtype="bfloat16")
    bits = np.load(tmp_path / "00000.npy")
    assert bits.dtype.str == "<u2"
    widened = (bits.astype(np.uint32) << 16).view(np.float32)
    assert (widened == rows.bfloat16().float().numpy()).all()


def test_a_folder_with_one_store_opens_and_with_two_does_not(tmp_path):
    make(tmp_path / "fc1")
    assert ActivationStore.open(tmp_path).hook == "fc1"
    make(tmp_path / "fc2")
    with pytest.raises(ValueError, match="fc1, fc2"):
        ActivationStore.open(tmp_path)
    with pytest.raises(FileNotFoundError, match="no store"):
        ActivationStore.open(tmp_path / "nowhere")


def test_as_store_takes_tensors_stores_and_paths(tmp_path):
    rows, _ = make(tmp_path)
    stored = as_store(str(tmp_path))
    assert torch.equal(stored[:], as_store(rows)[:])
    assert as_store(stored) is stored


def test_tensor_stores_refuse_what_is_not_rows():
    with pytest.raises(ValueError, match="expected"):
        TensorStore(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="2 provenance records for 3 rows"):
        TensorStore(torch.zeros(3, 3), pd.DataFrame({"id": [1, 2]}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensor_stores_give_float32(dtype):
    rows = torch.randn(5, 3).to(dtype)
    store = TensorStore(rows)
    assert store.dtype == dtype and len(store.fingerprint) == 64
    assert torch.equal(store.gather([4, 0]), rows[[4, 0]].float())
