"""More than one process gives what one gives, and a lost one loses nothing."""

import dataclasses
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from test_training import config, sparse_rows

from saeutils.distributed import Group
from saeutils.sae import load
from saeutils.training import train

SCRIPT = """
    import os, sys, torch
    from saeutils.training import TrainConfig, train
    rows = torch.load({rows!r})
    def watch(row):
        if os.environ.get("DIE_AT") == str(row["step"]):
            os._exit(9)  # as a lost machine: no clean-up
    train(rows, TrainConfig(**{config!r}), path={run!r}, progress=False,
          checkpoint_every=10, callback=watch)
    print("finished")
"""


def write_script(folder: Path, cfg, rows) -> str:
    torch.save(rows, folder / "rows.pt")
    script = textwrap.dedent(SCRIPT).format(
        rows=str(folder / "rows.pt"),
        run=str(folder / "run"),
        config=dataclasses.asdict(cfg),
    )
    (folder / "script.py").write_text(script)
    return str(folder / "script.py")


@pytest.mark.parametrize("architecture", ["batchtopk", "l1"])
def test_two_processes_equal_one(architecture, tmp_path):
    rows = sparse_rows()
    cfg = config(architecture, dead_after=500, aux_coefficient=1.0)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", write_script(tmp_path, cfg, rows)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stderr[-3000:]
    alone = train(rows, cfg, progress=False)
    together = load(tmp_path / "run" / "sae")
    import pandas as pd

    history = pd.read_parquet(tmp_path / "run" / "history.parquet")
    for column in ("loss", "fvu", "l0"):
        assert history[column].to_numpy() == pytest.approx(
            alone.history[column].to_numpy(), rel=1e-5
        )
    assert torch.allclose(together.W_dec, alone.sae.W_dec, atol=1e-4)


def test_a_lost_process_ends_the_run_and_another_number_resumes_it(tmp_path):
    rows, cfg = sparse_rows(), config("batchtopk", steps=60, log_every=1)
    command = [sys.executable, write_script(tmp_path, cfg, rows)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    lost, left = (  # as two machines would be: no launcher that stops the other
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | group | {"RANK": rank, "DIE_AT": "37"},
        )
        for rank in "01"
    )
    _, message = left.communicate(timeout=240)
    lost.communicate(timeout=240)
    assert lost.returncode == 9 and left.returncode == 1
    assert "another process of this run was lost" in message
    assert "last checkpoint" in message
    resumed = train(rows, cfg, path=tmp_path / "run", progress=False)
    assert resumed.history.step.tolist() == [*range(1, 61)]
    alone = train(rows, cfg, progress=False)
    assert torch.allclose(resumed.sae.W_dec, alone.sae.W_dec, atol=1e-4)


def test_a_batch_that_does_not_divide_is_refused(monkeypatch):
    monkeypatch.setattr("saeutils.training.current_group", lambda device: Group(0, 3))
    with pytest.raises(ValueError, match="not a multiple of the 3 processes"):
        train(sparse_rows(), config(), progress=False)


def test_without_torchrun_everything_is_the_identity():
    values = torch.arange(3.0)
    group = Group()
    group.sum_([values])
    group.broadcast_([values])
    group.barrier()
    assert torch.equal(group.gather(values), torch.arange(3.0))
