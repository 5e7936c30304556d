"""What can go wrong with a store, done for real: kills, full disks, damaged files."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from saeutils.activations import save_activations
from saeutils.sharded import rows_done
from saeutils.storage import AtomicFile
from saeutils.store import ActivationStore, StoreWriter

N, D = 1000, 8
fork = multiprocessing.get_context("fork")


def model(scale=1.0):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, D), nn.ReLU(), nn.Linear(D, 3))
    with torch.no_grad():
        net[2].weight *= scale
    return net


def inputs(n=N):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1))


def save(path, net=None, x=None, hooks=("0", "2"), **options):
    options = {"shard_bytes": 60 * D * 4, "batch_size": 37, **options}
    x = inputs() if x is None else x
    options.setdefault("provenance", {"label": np.arange(len(x)) % 10})
    return save_activations(
        net or model(), x, list(hooks), path, progress=False, **options
    )


def content(path: Path) -> dict[str, bytes]:
    """Every file under a folder of stores, but the locks."""
    return {
        str(f.relative_to(path)): f.read_bytes()
        for f in sorted(path.rglob("*"))
        if f.is_file() and f.name != ".lock"
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference")
    save(path)
    return content(path)


@pytest.fixture
def memory_path():
    """A folder in memory where there is one: these tests sync thousands of times."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


def run_and_kill(path: Path, seconds: float) -> bool:
    """Save in another process and kill -9 it; True when it had not finished."""
    child = fork.Process(target=save, args=(path,))
    child.start()
    child.join(seconds)
    child.kill()
    child.join()
    return child.exitcode == -signal.SIGKILL


def test_kill_at_random_instants_then_resume(memory_path, reference):
    dice, kills, path = random.Random(0), 0, memory_path / "victim"
    left = set()
    while kills < 50:
        if run_and_kill(path, dice.uniform(0, 0.1)):
            kills += 1
            if (path / "2" / "manifest.json").exists():
                left.add(len(ActivationStore.open(path / "2", partial=True)))
        else:
            assert content(path) == reference
            shutil.rmtree(path)
    assert len(left) >= 5  # the kills did hit in the middle
    stores = save(path)
    assert content(path) == reference
    for store in stores.values():
        store.verify()
        assert store.provenance["id"].tolist() == list(range(N))


def die_at(step: int, path: Path) -> None:
    """Save, but kill this process before or after one of its fsyncs and renames."""
    calls = 0

    def deadly(function):
        def call(*args):
            nonlocal calls
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args)
            calls += 1
            if calls == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    save(path, x=inputs(70), batch_size=50)


def test_kill_at_every_single_step(memory_path):
    """Exhaustive over all commits of a small store: before and after each step."""
    save(memory_path / "whole", x=inputs(70), batch_size=50)
    expected = content(memory_path / "whole")
    for step in range(1, 1000):
        path = memory_path / f"victim-{step}"
        child = fork.Process(target=die_at, args=(step, path))
        child.start()
        child.join(60)
        assert child.exitcode is not None, f"step {step} hangs"
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        for folder in path.iterdir() if path.exists() else []:
            if (folder / "manifest.json").exists():  # what is there is right already
                ActivationStore.open(folder, partial=True).verify()
        save(path, x=inputs(70), batch_size=50)
        assert content(path) == expected, f"killed at step {step}"
        shutil.rmtree(path)
    assert step > 50  # each of 4 shards takes 3 files with 3 steps


def test_an_unfinished_store_opens_only_when_asked(tmp_path):
    writer = StoreWriter(tmp_path, hook="x", d_in=2, expected_rows=9, rows_per_shard=4)
    assert rows_done(tmp_path / "none") == rows_done(tmp_path) == 0
    writer.append(torch.ones(5, 2))
    assert rows_done(tmp_path) == 4
    writer.abandon()
    with pytest.raises(ValueError, match=r"not complete \(4 of 9 rows\)"):
        ActivationStore.open(tmp_path)
    assert len(ActivationStore.open(tmp_path, partial=True)) == 4


def test_an_error_of_the_user_keeps_finished_shards(tmp_path):
    rows = torch.arange(20.0).reshape(10, 2)
    options = {"hook": "x", "d_in": 2, "expected_rows": 10, "rows_per_shard": 3}
    with pytest.raises(KeyError), StoreWriter(tmp_path, **options) as writer:
        writer.append(rows[:8])
        raise KeyError("in the user's own loop")
    with StoreWriter(tmp_path, **options) as writer:
        assert writer.rows_done == 6
        writer.append(rows[6:])
    assert torch.equal(ActivationStore.open(tmp_path)[:], rows)


# Full disks ----------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.name == "nt" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def fill(writer, rows):
    for at in range(writer.rows_done, len(rows), 500):
        part = rows[at : min(len(rows), at + 500)]
        writer.append(part, {"id": np.arange(at, at + len(part))})


def test_a_full_disk_leaves_a_resumable_store(small_disk, tmp_path):
    rows = torch.randn(8000, D)
    options = {"hook": "x", "d_in": D, "expected_rows": 8000, "rows_per_shard": 1500}
    with StoreWriter(tmp_path / "reference", **options) as writer:
        fill(writer, rows)
    (small_disk / "ballast").write_bytes(bytes(165 * 1024))
    with (
        pytest.raises(OSError, match=r"full\. 1,500 rows are safe") as error,
        StoreWriter(small_disk / "s", **options) as writer,
    ):
        fill(writer, rows)
    assert error.value.errno == errno.ENOSPC
    ActivationStore.open(small_disk / "s", partial=True).verify()
    (small_disk / "ballast").unlink()
    with (  # still too small for all of it
        pytest.raises(OSError, match="are safe"),
        StoreWriter(small_disk / "s", **options) as writer,
    ):
        fill(writer, rows)
    subprocess.run(["mount", "-o", "remount,size=2m", small_disk], check=True)
    with StoreWriter(small_disk / "s", **options) as writer:
        assert writer.rows_done > 1500
        fill(writer, rows)
    assert content(small_disk / "s") == content(tmp_path / "reference")


def test_what_does_not_fit_the_disk_is_refused_before_any_work(small_disk):
    with pytest.raises(ValueError, match=r"bytes more and .* are free"):
        save(small_disk / "s", x=inputs(9000))
    assert not (small_disk / "s").exists()


@pytest.mark.parametrize("after", [1, 2, 3, 7, 20])
def test_a_disk_that_is_full_at_any_write(tmp_path, monkeypatch, reference, after):
    """The same without root: the after-th write fails half way."""
    real, calls = AtomicFile._write, 0

    def write(self, data):
        nonlocal calls
        calls += 1
        if calls == after:
            real(self, memoryview(data).cast("B")[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    monkeypatch.setattr(AtomicFile, "_write", write)
    with pytest.raises(OSError, match=r"No space left|is full") as error:
        save(tmp_path)
    assert error.value.errno == errno.ENOSPC
    assert not list(tmp_path.rglob(".*.tmp"))
    save(tmp_path)
    assert content(tmp_path) == reference


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(OSError, match=r"cannot write to .*file"):
        save(tmp_path / "file")


# Damaged files -------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    return Path(save(tmp_path, hooks=["0"])["0"].folder.path)


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_damage_is_found_and_named(stored, kind):
    a, b = stored / f"00003.{kind}", stored / f"00005.{kind}"
    whole_a, whole_b = a.read_bytes(), b.read_bytes()
    middle = len(whole_a) // 2
    flipped = whole_a[:middle] + bytes([whole_a[middle] ^ 16]) + whole_a[middle + 1 :]

    ActivationStore.open(stored).verify()
    a.write_bytes(flipped)
    with pytest.raises(ValueError, match=rf"damaged: 00003\.{kind} is damaged"):
        ActivationStore.open(stored).verify()
    a.write_bytes(whole_a[:-5])
    with pytest.raises(ValueError, match=rf"00003\.{kind} is truncated"):
        ActivationStore.open(stored)
    a.unlink()
    with pytest.raises(ValueError, match=rf"00003\.{kind} is missing"):
        ActivationStore.open(stored)
    a.write_bytes(whole_a + b"x")
    with pytest.raises(ValueError, match=rf"00003\.{kind} is too long"):
        ActivationStore.open(stored)
    if len(whole_a) == len(whole_b):
        a.write_bytes(whole_b)
        b.write_bytes(whole_a)
        with pytest.raises(ValueError) as error:
            ActivationStore.open(stored).verify()
        assert f"00003.{kind} holds what belongs to 00005.{kind}" in str(error.value)
        assert f"00005.{kind} holds what belongs to 00003.{kind}" in str(error.value)
    else:
        assert kind == "parquet"


def test_every_damaged_file_is_named_at_once(stored):
    for name in ("00000.npy", "00007.npy"):
        content = bytearray((stored / name).read_bytes())
        content[-1] ^= 1
        (stored / name).write_bytes(content)
    (stored / "00004.npy").unlink()
    with pytest.raises(ValueError, match="00004"):
        ActivationStore.open(stored)
    store = ActivationStore.open
    (stored / "00004.npy").write_bytes((stored / "00003.npy").read_bytes())
    with pytest.raises(ValueError, match=r"00000.*00004.*belongs to 00003.*00007"):
        store(stored).verify()


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_manifests_that_cannot_be_read(stored):
    edit_manifest(stored, version=2)
    with pytest.raises(ValueError, match=r"version 2.*update"):
        ActivationStore.open(stored)
    with pytest.raises(ValueError, match="version 2"):
        save(stored.parent, hooks=["0"])
    edit_manifest(stored, version=1, format="something else")
    with pytest.raises(ValueError, match="'something else'"):
        ActivationStore.open(stored)
    (stored / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json is damaged"):
        ActivationStore.open(stored)


@pytest.mark.parametrize("name", ["/etc/passwd", "../outside.npy"])
def test_a_manifest_may_not_point_outside(stored, name):
    shards = json.loads((stored / "manifest.json").read_text())["shards"]
    shards[0]["files"]["rows"]["file"] = name
    edit_manifest(stored, shards=shards)
    with pytest.raises(ValueError, match="outside the store"):
        ActivationStore.open(stored)


def test_a_shard_of_another_shape_is_refused(stored):
    np.save(stored / "00002.npy", np.zeros((30, 16), "<f4"))
    store = ActivationStore.open(stored)
    with pytest.raises(ValueError, match=r"00002\.npy holds \(30, 16\)"):
        store.gather([0])


# Two writers, and a store of something else ---------------------------------------


def test_the_second_writer_is_refused(tmp_path):
    with StoreWriter(tmp_path, hook="x", d_in=2) as writer:
        with pytest.raises(ValueError, match="being written"):
            StoreWriter(tmp_path, hook="x", d_in=2)
        writer.append(torch.ones(1, 2))
    assert len(ActivationStore.open(tmp_path)) == 1


def hold(path, ready):
    with StoreWriter(path, hook="x", d_in=2):
        ready.set()
        time.sleep(60)


def test_a_writer_in_another_process_is_refused_until_it_is_gone(tmp_path):
    ready = fork.Event()
    child = fork.Process(target=hold, args=(tmp_path, ready))
    child.start()
    assert ready.wait(30)
    with pytest.raises(ValueError, match="being written by another process"):
        StoreWriter(tmp_path, hook="x", d_in=2)
    child.kill()  # leaves the lock file, not the lock
    child.join()
    StoreWriter(tmp_path, hook="x", d_in=2).abandon()


def test_what_changed_since_the_start_is_refused(tmp_path, reference):
    save(tmp_path)
    x = inputs()
    x[5, 2] += 1e-3
    changes = {
        "model": {"net": model(scale=1.001)},
        "data": {"x": x},
        "data again": {"provenance": {"label": np.arange(N) % 9}},
        "number of rows": {"x": inputs(N - 1)},
        "dtype": {"dtype": "float16"},
        "seed": {"seed": 3},
        "settings": {"layout": {"0": "batch (d)"}},
    }
    for what, options in changes.items():
        with pytest.raises(ValueError, match=f"something else.*{what.split()[0]}"):
            save(tmp_path, **options)
    assert content(tmp_path) == reference


# Values that no store may hold ----------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_with_the_id(tmp_path, bad):
    x = inputs()
    x[700, 1] = bad
    with pytest.raises(ValueError, match=r"row 700 \(id=1700, label=0\) of hook '0'"):
        ids = np.arange(N) + 1000
        save(tmp_path, x=x, provenance={"id": ids, "label": np.arange(N) % 10})
    # The shards before are there, and right.
    partial = ActivationStore.open(tmp_path / "0", partial=True)
    assert 600 <= len(partial) <= 700
    partial.verify()


def test_float16_overflow_is_refused_and_bfloat16_holds_it(tmp_path):
    x = inputs()
    x[123] *= 1e6
    with pytest.raises(ValueError, match=r"row 123 .*too large for float16: store as"):
        save(tmp_path / "half", x=x, dtype="float16")
    stores = save(tmp_path / "brain", x=x, dtype="bfloat16")
    assert stores["0"][123:124].abs().max() > 65504


def test_float16_keeps_its_largest_number(tmp_path):
    with StoreWriter(tmp_path, hook="x", d_in=2, dtype="float16") as writer:
        writer.append(torch.tensor([[65504.0, -65504.0]]))
        with pytest.raises(ValueError, match="too large"):
            writer.append(torch.tensor([[65520.0, 0.0]]))
    assert ActivationStore.open(tmp_path)[:].tolist() == [[65504.0, -65504.0]]


def test_a_shard_of_zeros_is_worth_a_warning(tmp_path):
    options = {"hook": "x", "d_in": 2, "rows_per_shard": 3}
    rows = torch.ones(9, 2)
    rows[3:8] = 0
    with (
        pytest.warns(UserWarning, match=r"all 3 rows of 00001\.npy are 0") as caught,
        StoreWriter(tmp_path, **options) as writer,
    ):
        for row in rows:
            writer.append(row[None])
    assert len(caught) == 1
    with (
        warnings.catch_warnings(action="error"),
        StoreWriter(tmp_path / "ones", **options) as writer,
    ):
        writer.append(torch.ones(9, 2))  # three shards in one go


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_in": 0}, "both must be ≥ 1"),
        ({"expected_rows": 0}, "both must be ≥ 1"),
        ({"dtype": "int8"}, "expected one of float32, float16, bfloat16"),
        ({"rows_per_shard": 0}, "at least 1"),
    ],
)
def test_impossible_stores_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        StoreWriter(tmp_path / "s", **{"hook": "x", "d_in": 2, **options})
    assert not (tmp_path / "s").exists()


def test_wrong_appends_are_refused(tmp_path):
    with StoreWriter(tmp_path, hook="x", d_in=2, expected_rows=4) as writer:
        for rows, columns, message in [
            (torch.ones(2, 3), {}, r"\(2, 3\): expected \(n, 2\)"),
            (torch.ones(5, 2), {}, "row 5 appended to a store of 4"),
            (torch.ones(2, 2), {"id": [1, 2, 3]}, r"'id' of shape \(3,\)"),
            (torch.ones(2, 2), {"id": [None, 1]}, "'id' .* type object"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.append(rows, columns)
        writer.append(torch.ones(2, 2), {"id": [1, 2]})
        with pytest.raises(ValueError, match="this store has"):
            writer.append(torch.ones(2, 2), {"id": ["a", "b"]})
        with pytest.raises(ValueError, match="this store has"):
            writer.append(torch.ones(2, 2))
        writer.append(torch.ones(2, 2), {"id": [3, 4]})
    assert ActivationStore.open(tmp_path).provenance["id"].tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="closed"):
        writer.append(torch.ones(1, 2))


def test_closing_too_early_is_refused_and_loses_nothing(tmp_path):
    options = {"hook": "x", "d_in": 2, "expected_rows": 10, "rows_per_shard": 4}
    rows = torch.arange(20.0).reshape(10, 2)
    with (
        pytest.raises(ValueError, match="given 9 of 10 rows"),
        StoreWriter(tmp_path, **options) as writer,
    ):
        writer.append(rows[:9])
    with StoreWriter(tmp_path, **options) as writer:
        writer.append(rows[writer.rows_done :])
    assert torch.equal(ActivationStore.open(tmp_path)[:], rows)
    with (
        pytest.raises(ValueError, match="given 0 of"),
        StoreWriter(tmp_path / "empty", hook="x", d_in=2),
    ):
        pass
