"""Runs on known truths: the columns that notebooks read, and the published set-up."""

import torch

from saeutils.firing import Independent
from saeutils.recovery_runs import (
    benchmark_recipes,
    on_benchmark,
    phase,
    size_sweep,
)
from saeutils.synth_bench import PUBLISHED, SynthBench
from saeutils.synthetic import Synthetic, SyntheticConfig
from saeutils.training import TrainConfig


def test_a_sweep_scores_every_size_twice_trained():
    truth = Synthetic(SyntheticConfig(n=24, d=16, l0=2, frequency="uniform"))
    frame = size_sweep(truth, widths=[12, 24], ks=[2], l1s=[0.5], steps=150)
    names = ["TopK, k = 2"] * 2 + ["L1, coefficient 0.5"] * 2
    assert frame["name"].tolist() == names
    assert frame["latents"].tolist() == [12, 24] * 2
    topk = frame[frame["name"] == names[0]]
    assert topk["found"].iloc[1] > 0.6 > topk["found"].iloc[0]
    assert topk["FVU"].is_monotonic_decreasing and (topk["L0"] <= 2).all()
    assert frame["agreement"].between(0, 1).all()


def test_phase_has_an_edge():
    found = phase([12, 24], [1, 6], d=12, steps=150)
    assert found.shape == (2, 2)
    assert found[0, 0] > 0.5 and (found[:, 0] > found[:, 1]).all()


def test_a_small_benchmark_beats_random_directions():
    bench, saes = SynthBench(1 / 64, orthogonal_steps=5), {}
    frame = on_benchmark(bench, steps=60, rows=8192, saes=saes).set_index("name")
    assert [*frame.index] == ["matryoshka", "batchtopk", "random dictionary"]
    assert [*saes] == ["matryoshka", "batchtopk"]
    assert frame["MCC"].idxmin() == frame["F1"].idxmin() == "random dictionary"


def test_the_full_size_is_the_published_one():
    bench = SynthBench.__new__(SynthBench)
    bench.W, bench.law = torch.zeros(16_384, 1), Independent(torch.ones(16_384) / 300)
    recipes = benchmark_recipes(bench)
    assert recipes.keys() == PUBLISHED.keys()
    for recipe in recipes.values():
        config = TrainConfig(**recipe, steps=1)
        assert (config.d_sae, config.k) == (4096, 25)
    assert recipes["matryoshka"]["widths"] == (128, 512, 2048, 4096)
