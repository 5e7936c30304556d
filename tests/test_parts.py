"""Several processes, one store: parts, their sealing, lost ones, and torchrun."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saeutils.activations import save_activations
from saeutils.parts import Part
from saeutils.store import ActivationStore


def save(path, part=None, n=50, seed=0, batch_size=4, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(60, 3), nn.Linear(3, 4))
    x = torch.arange(n * 5).reshape(n, 5) % 60
    options = {"shard_bytes": 7 * 12, "progress": False, **options}
    hooks = ["0", "1"]
    return save_activations(
        model, x, hooks, path, part=part, batch_size=batch_size, **options
    )


def same(a, b):
    assert torch.equal(a[:], b[:]) and a.provenance.equals(b.provenance)
    a.verify()


@given(st.integers(1, 200), st.integers(1, 30), st.integers(1, 9))
def test_parts_are_the_whole_in_order(n, batch_size, world_size):
    parts = [Part.of(n, batch_size, r, world_size) for r in range(world_size)]
    inputs = [i for p in parts for i in range(p.start, p.stop)]
    assert inputs == list(range(n))
    assert all(p.start % batch_size == 0 for p in parts if p.start < n)


@pytest.mark.parametrize("world_size", [2, 3, 40])
def test_parts_make_the_store_of_a_single_process(tmp_path, world_size):
    single = save(tmp_path / "single")
    order = torch.randperm(world_size, generator=torch.Generator().manual_seed(0))
    for count, rank in enumerate(order.tolist(), start=1):
        stores = save(tmp_path / "parts", (rank, world_size))
        if count < world_size and world_size < 40:
            assert stores == {}
            with pytest.raises(ValueError, match="not complete: its parts"):
                ActivationStore.open(tmp_path / "parts" / "0")
    for hook in ("0", "1"):
        same(stores[hook], single[hook])
    # Sealed: any number of processes now just opens it.
    assert save(tmp_path / "parts", (0, world_size)).keys() == {"0", "1"}
    same(save(tmp_path / "parts")["0"], single["0"])
    with pytest.raises(ValueError, match="something else: the model"):
        save(tmp_path / "parts", (0, world_size), seed=1)


def test_a_lost_part_is_resumed_alone(tmp_path):
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    save(tmp_path / "a", (0, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Embedding, "forward", wrap(nn.Embedding.forward, fail))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path / "a", (1, 2))
    manifest = tmp_path / "a" / "0" / "part-00001-of-00002" / "manifest.json"
    assert 0 < json.loads(manifest.read_text())["rows"] < 125
    with pytest.raises(ValueError, match="not complete"):
        ActivationStore.open(tmp_path / "a" / "0")
    stores = save(tmp_path / "a", (1, 2))
    same(stores["1"], save(tmp_path / "single")["1"])


def wrap(function, before):
    def wrapped(*arguments):
        before()
        return function(*arguments)

    return wrapped


def test_parts_of_something_else_are_refused(tmp_path):
    save(tmp_path, (0, 2))
    with pytest.raises(ValueError, match="something else"):
        save(tmp_path, (0, 2), seed=1)
    with pytest.raises(ValueError, match="something else"):
        save(tmp_path, (1, 2), seed=1)  # found when the whole is to be sealed
    with pytest.raises(ValueError, match="part 2 of 2"):
        save(tmp_path, (2, 2))


def test_a_store_begun_by_one_process_is_not_continued_by_two(tmp_path):
    save(tmp_path)
    manifest = tmp_path / "0" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "complete": False}))
    with pytest.raises(ValueError, match="single process"):
        save(tmp_path, (0, 2))


def test_torchrun(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import sys, torch
            from torch import nn
            from saeutils.activations import save_activations
            torch.manual_seed(0)
            model = nn.Sequential(nn.Embedding(60, 3), nn.Linear(3, 4))
            x = torch.arange(250).reshape(50, 5) % 60
            stores = save_activations(
                model, x, ["0", "1"], sys.argv[1], batch_size=4, shard_bytes=84,
                progress=False,
            )
            assert [len(store) for store in stores.values()] == [250, 250]
            torch.distributed.destroy_process_group()
            """
        )
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", script, tmp_path / "run"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    single = save(tmp_path / "single")
    for hook in ("0", "1"):
        store = ActivationStore.open(tmp_path / "run" / hook)
        same(store, single[hook])
        files = {s["files"]["rows"]["file"][:10] for s in store.manifest["shards"]}
        assert files == {"part-00000", "part-00001"}
