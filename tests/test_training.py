"""The training loop: it learns, repeats, resumes bit for bit, and refuses."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from saeutils import runs, trainer, training
from saeutils.sae import initial_params
from saeutils.trainer import geometric_median
from saeutils.training import TrainConfig, train, train_many

SMALL = dict(d_sae=64, k=4, steps=40, batch_size=64, lr=3e-3)
EVERY = {
    "topk": {},
    "batchtopk": {},
    "matryoshka": dict(widths=(8, 24, 64)),
    "l1": dict(l1_coefficient=0.5),
    "gated": dict(l1_coefficient=0.5),
    "jumprelu": dict(l0_coefficient=0.05),
}


def config(architecture="topk", **changes) -> TrainConfig:
    return TrainConfig(
        architecture=architecture, **{**SMALL, **EVERY[architecture], **changes}
    )


def sparse_rows(n=2000, d=16, n_features=48, active=3, seed=0) -> torch.Tensor:
    """Sums of a few of 48 directions, off centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(n_features, d, generator=generator)
    chosen = torch.rand(n, n_features, generator=generator).topk(active).indices
    strength = torch.rand(n, active, 1, generator=generator) + 0.5
    return (directions[chosen] * strength).sum(1) + 2.0


@pytest.fixture(scope="module")
def rows():
    return sparse_rows()


def fvu(sae, x):
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("architecture", EVERY)
def test_every_architecture_learns(architecture, rows):
    short = train(
        rows, config(architecture, steps=1, lr_warm_up_steps=0), progress=False
    )
    long = train(rows, config(architecture, steps=300), progress=False)
    assert fvu(long.sae, rows) < 0.75 * fvu(short.sae, rows)
    assert fvu(long.sae, rows) < 0.6
    assert torch.allclose(long.sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    last = long.history.iloc[-1]
    assert last.step == 300 and last.rows == 300 * 64
    assert long.history[["loss", "mse", "fvu", "l0"]].notna().all(axis=None)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_inference_threshold_is_exact_after_100_steps(architecture, rows):
    result = train(rows, config(architecture, steps=100), progress=False)
    # 2000 rows are 31 whole batches of 64: the threshold is exact on 1984 of them
    l0 = float((result.sae.encode(rows) > 0).sum()) / len(rows)
    assert l0 == pytest.approx(4, rel=0.005)
    threshold = float(result.sae.threshold[0])
    assert result.info["threshold"] == pytest.approx(threshold)


def test_topk_keeps_at_most_k(rows):
    result = train(rows, config(), progress=False)
    assert int((result.sae.encode(rows) > 0).sum(1).max()) <= 4


@pytest.mark.parametrize("architecture", EVERY)
def test_same_seed_same_result(architecture, rows):
    a, b = (train(rows, config(architecture), progress=False) for _ in range(2))
    assert all(
        torch.equal(p, q)
        for p, q in zip(a.sae.parameters(), b.sae.parameters(), strict=True)
    )
    c = train(rows, config(architecture, seed=1), progress=False)
    assert not torch.equal(a.sae.W_dec, c.sae.W_dec)
    assert torch.equal(a.W_dec_init, b.W_dec_init)


@pytest.mark.parametrize("architecture", EVERY)
def test_resuming_equals_never_having_stopped(architecture, rows, tmp_path):
    # two kinds of revival and a running window are part of the state
    changes = dict(
        steps=60, dead_after=300, revival=("auxk", "resample"), resample_steps=(30, 45)
    )
    whole = train(
        rows, config(architecture, **changes), path=tmp_path / "a", progress=False
    )

    class Killed(Exception):
        pass

    def kill(row):
        if row["step"] == 37:
            raise Killed

    args = dict(path=tmp_path / "b", progress=False, checkpoint_every=10)
    with pytest.raises(Killed):
        train(rows, config(architecture, log_every=1, **changes), callback=kill, **args)
    assert (
        runs.Run(
            tmp_path / "b",
            config(architecture, log_every=1, **changes),
            training.as_store(rows),
        ).checkpoint.scalars["done"]
        == 30
    )
    resumed = train(rows, config(architecture, log_every=1, **changes), **args)
    for p, q in zip(whole.sae.parameters(), resumed.sae.parameters(), strict=True):
        assert torch.equal(p, q)
    assert resumed.history.step.tolist() == [*range(1, 61)]
    again = train(rows, config(architecture, log_every=1, **changes), **args)
    assert torch.equal(again.sae.W_dec, whole.sae.W_dec)


def test_kill_dash_nine_at_any_instant(rows, tmp_path):
    """Killed for real, again and again; the end is that of an undisturbed run."""
    torch.save(rows, tmp_path / "rows.pt")
    script = textwrap.dedent(f"""
        import sys, torch
        from saeutils.training import TrainConfig, train
        rows = torch.load({str(tmp_path / "rows.pt")!r})
        config = TrainConfig(**{dataclasses.asdict(config("batchtopk", steps=400))!r})
        print("started", flush=True)
        train(rows, config, path={str(tmp_path / "run")!r}, progress=False,
              checkpoint_every=1, callback=lambda row: print(row["step"], flush=True))
        print("finished", flush=True)
    """)
    expected = train(rows, config("batchtopk", steps=400), progress=False)
    delays = iter([0.0, 0.21, 0.05, 0.33])
    finished = False
    while not finished:
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
        )
        delay = next(delays, None)
        for line in process.stdout:
            finished |= line == "finished\n"
            if line.strip().isdigit() and delay is not None:
                time.sleep(delay)
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
        process.stdout.close()
    from saeutils.sae import load

    assert torch.equal(load(tmp_path / "run" / "sae").W_dec, expected.sae.W_dec)


def test_a_run_folder_of_another_config_or_other_data_is_refused(rows, tmp_path):
    train(rows, config(), path=tmp_path / "run", progress=False)
    before = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match=r"another config \(k: 4 there, 5 here\)"):
        train(rows, config(k=5), path=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="another data"):
        train(rows + 1, config(), path=tmp_path / "run", progress=False)
    assert before == {
        f.name: f.stat().st_mtime_ns for f in (tmp_path / "run").iterdir()
    }
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(ValueError, match="not empty"):
        train(rows, config(), path=tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "…"


def test_what_a_run_folder_holds(rows, tmp_path):
    import pandas as pd

    result = train(
        rows, config(), path=tmp_path / "run", eval_rows=rows[:500], progress=False
    )
    assert {f.name for f in (tmp_path / "run").iterdir()} == {
        "run.json",
        "checkpoint.safetensors",
        "history.parquet",
        "sae",
        "scorecard.json",
    }
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    card = json.loads((tmp_path / "run" / "scorecard.json").read_text())
    assert card["FVU"] == pytest.approx(result.scorecard.fvu)
    assert record["config"]["d_sae"] == 64 and record["data"]["rows"] == 2000
    assert record["versions"]["torch"] == torch.__version__
    pd.testing.assert_frame_equal(
        pd.read_parquet(tmp_path / "run" / "history.parquet"), result.history
    )


def test_ctrl_c_keeps_what_was_trained(rows, tmp_path):
    def interrupt(row):
        if row["step"] == 25:
            raise KeyboardInterrupt

    cfg = config(log_every=1)
    result = train(rows, cfg, path=tmp_path / "run", progress=False, callback=interrupt)
    assert result.info["interrupted"] and result.info["steps"] == 25
    assert len(result.history) == 25
    resumed = train(rows, cfg, path=tmp_path / "run", progress=False)
    assert not resumed.info["interrupted"]
    assert torch.equal(resumed.sae.W_dec, train(rows, cfg, progress=False).sae.W_dec)


@settings(max_examples=6)
@given(
    picked=st.lists(st.sampled_from(sorted(EVERY)), min_size=1, max_size=3),
    seed=st.integers(0, 5),
)
def test_many_at_once_equal_each_alone(picked, seed):
    rows = sparse_rows(500)
    configs = [
        config(name, seed=seed + i, steps=12 + 5 * i) for i, name in enumerate(picked)
    ]
    for result, cfg in zip(
        train_many(rows, configs, progress=False), configs, strict=True
    ):
        alone = train(rows, cfg, progress=False)
        assert torch.equal(result.sae.W_dec, alone.sae.W_dec)
        assert result.history.drop(columns="seconds").equals(
            alone.history.drop(columns="seconds")
        )


def test_train_many_wants_shared_batches(rows):
    with pytest.raises(ValueError, match="differ in batch_size"):
        train_many(rows, [config(), config(batch_size=32)], progress=False)
    with pytest.raises(ValueError, match="no configs"):
        train_many(rows, [], progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k=65), "k must lie in 1 … d_sae=64, got 65"),
        (dict(k=2.5), "whole k"),
        (dict(architecture="tpok"), "none of"),
        (dict(architecture="l1"), "l1_coefficient > 0"),
        (dict(architecture="jumprelu"), "l0_coefficient > 0"),
        (dict(l1_coefficient=1.0), "sets its sparsity by k"),
        (dict(architecture="matryoshka", widths=(8, 8, 64)), "must rise"),
        (dict(architecture="matryoshka", widths=(8, 32)), "d_sae=64"),
        (dict(widths=(8, 64)), "belong to matryoshka"),
        (dict(lr=0.0), "lr must be positive"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(lr_warm_up_steps=30, lr_decay_steps=20), "exceed steps"),
        (dict(revival=("resample",)), "go together"),
        (dict(decoder_norm="unit", decoder_init_norm=0.1), "starts at"),
        (dict(decoder_init_norm=0), "must be positive"),
        (dict(resample_length=0), "resample_length must be positive"),
        (dict(revival=("prayer",)), "revival 'prayer' is none of"),
        (dict(b_dec_init="medain"), "'medain' is none of"),
    ],
)
def test_a_config_that_contradicts_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**SMALL, **changes})


def test_bad_rows_are_refused(rows, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(ValueError):
        train(rows[:0], config(), path=path, progress=False)
    refused = (ValueError, TypeError, TypeCheckError)  # the last from the test run
    with pytest.raises(refused):
        train(rows[0], config(), path=path, progress=False)
    with pytest.raises(refused):
        train(iter([rows]), config(), path=path, progress=False)
    with pytest.raises(ValueError, match="d_in"):
        train(rows, config(), eval_rows=rows[:, :8], path=path, progress=False)
    with pytest.raises(ValueError, match="all zero"):
        train(rows * 0, config(), path=path, progress=False)
    spoilt = rows.clone()
    spoilt[123, 4] = float("nan")
    with pytest.raises(ValueError, match=r"rows \[123\] .* NaN"):
        train(spoilt, config(), path=path, progress=False)
    assert not path.exists()


def test_divergence_names_the_step(rows):
    with pytest.raises(FloatingPointError, match=r"at step \d+ .* diverged"):
        train(
            rows,
            config(
                "l1", lr=1e30, lr_warm_up_steps=0, decoder_norm="free", grad_clip=None
            ),
            progress=False,
        )


def test_collapse_speaks_up(rows):
    with pytest.warns(UserWarning, match="collapsed"):
        result = train(
            rows,
            config("l1", l1_coefficient=1e4, steps=600, revival=()),
            progress=False,
        )
    assert "collapse" in [m["kind"] for m in result.info["messages"]]
    assert result.history.l0.iloc[-1] < 1e-3


def test_switches_do_what_they_say(rows):
    free = train(rows, config(decoder_norm="free"), progress=False)
    assert float((free.sae.W_dec.norm(dim=1) - 1).abs().max()) > 1e-3
    plain = train(rows, config(pre_encoder_bias=False), progress=False)
    assert plain.sae.cfg.apply_b_dec_to_input is False
    unscaled = train(rows, config(input_scale="none"), progress=False)
    assert unscaled.info["input_scale"] == 1.0
    scaled = train(rows, config(), progress=False)
    norm = float(rows.norm(dim=1).mean())
    assert scaled.info["input_scale"] == pytest.approx(4 / norm, rel=0.01)
    assert scaled.info["init_rows"] == 2000
    unit = train(rows, config(decoder_norm="unit"), progress=False)
    parallel = config(decoder_norm="unit", remove_parallel_grad=False)
    parallel = train(rows, parallel, progress=False)
    for result in (scaled, unit, parallel):
        assert torch.allclose(result.sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)
    assert not torch.equal(unit.sae.W_dec, scaled.sae.W_dec)
    assert not torch.equal(unit.sae.W_dec, parallel.sae.W_dec)


def test_auxk_brings_latents_back_that_never_fire(rows, monkeypatch):
    def half_dead(*args, **kwargs):
        params = initial_params(*args, **kwargs)
        params["b_enc"][32:] = -2
        return params

    monkeypatch.setattr(trainer, "initial_params", half_dead)

    def alive(architecture="topk", **changes):
        sae = train(
            rows,
            config(architecture, steps=300, lr=1e-2, dead_after=500, **changes),
            progress=False,
        ).sae
        return int(((sae.encode(rows) > 0).any(0))[32:].sum())

    assert alive(revival=()) == 0
    assert alive(revival=("auxk",), aux_coefficient=1.0) > 10
    assert alive("l1", revival=()) == 0
    assert alive("l1", revival=("resample",), resample_steps=(100,)) > 10
    again = dict(revival=("resample",), resample_steps=(100,))
    assert alive(**again, resample_length=1.0) > alive(**again) + 5
    assert alive("l1", revival=("ghost",)) > 10


def test_learning_rate_rises_and_falls():
    cfg = config(steps=100, lr=1.0, lr_warm_up_steps=10, lr_decay_steps=20)
    assert cfg.lr_at(0) == pytest.approx(0.1)
    assert cfg.lr_at(9) == cfg.lr_at(80) == 1.0
    assert cfg.lr_at(99) == pytest.approx(0.05)
    l1 = config("l1", steps=100, sparsity_warm_up_steps=50)
    assert l1.penalty_at(0).coefficient == pytest.approx(0.01)
    assert l1.penalty_at(60).coefficient == 0.5


def test_geometric_median_of_points_with_an_outlier():
    rows = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1], [1000, 1000]])
    median = geometric_median(rows)
    best = (rows - median).norm(dim=1).sum()
    for step in torch.eye(2) * 0.01:
        assert best <= (rows - median - step).norm(dim=1).sum() + 1e-4
        assert best <= (rows - median + step).norm(dim=1).sum() + 1e-4
    assert float(median.max()) < 2


def test_scorecard_of_the_result(rows):
    result = train(rows, config(), eval_rows=rows[:500], progress=False)
    assert result.scorecard.fvu == pytest.approx(fvu(result.sae, rows[:500]), rel=1e-4)


def test_tensorboard_gets_every_row(rows, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = runs.tensorboard(tmp_path)
    result = train(rows, config(), progress=False, callback=callback)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    written = [(e.step, e.value) for e in events.Scalars("fvu")]
    assert [s for s, _ in written] == result.history.step.tolist()
    assert [v for _, v in written] == pytest.approx(result.history.fvu.tolist())


def test_many_dead_latents_speak_up(rows):
    changes = dict(d_sae=512, k=1, steps=200, lr=1e-2, dead_after=64, revival=())
    with pytest.warns(UserWarning, match="of 512 latents have not fired"):
        result = train(rows, config(**changes), progress=False)
    assert [m["kind"] for m in result.info["messages"]] == ["dead"]


def test_a_bad_row_among_many_is_named_when_it_is_met(rows, monkeypatch):
    monkeypatch.setattr(trainer, "INIT_ROWS", 10)
    spoilt = rows.clone()
    order = next(training.as_store(rows).batches(2000, steps=1)).index
    spoilt[order[1000], 4] = float("inf")
    with pytest.raises(FloatingPointError, match=rf"step 15 .*rows \[{order[1000]}\]"):
        train(spoilt, config(), progress=False)
