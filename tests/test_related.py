"""Two models with a known share in common, and the benchmark rebuilt."""

import pytest
import torch

from saeutils.related import related
from saeutils.synth_bench import SynthBench
from saeutils.synthetic import Synthetic, SyntheticConfig

TRUTH = Synthetic(SyntheticConfig(n=64, d=32, l0=4))


@pytest.mark.parametrize("directions", ["same", "rotated", "random"])
def test_shared_features_fire_together_and_private_ones_do_not(directions):
    pair = related(TRUTH, shared=0.25, directions=directions)
    a, b = pair.sample(9000)
    assert len(pair.in_a) == 16 and torch.equal(a.rows, TRUTH.rows(9000))
    assert torch.equal(a.acts[:, pair.in_a], b.acts[:, pair.in_b])
    correlation = torch.corrcoef(torch.cat([a.acts, b.acts], 1).T)[:64, 64:]
    correlation[pair.in_a, pair.in_b] = 0
    assert correlation.abs().max() < 0.08
    torch.testing.assert_close(b.rows, b.acts @ pair.b.W + pair.b.b, atol=1e-4, rtol=0)
    torch.testing.assert_close(pair.b.W.norm(dim=1), torch.ones(64))
    assert b.acts.gt(0).sum(1).float().mean().item() == pytest.approx(4, rel=0.04)


def test_a_rotation_keeps_angles_and_same_keeps_directions():
    same = related(TRUTH, shared=1, directions="same")
    assert torch.equal(same.b.W[same.in_b], TRUTH.W[same.in_a])
    rotated = related(TRUTH, shared=1, directions="rotated")
    W_a, W_b = TRUTH.W[rotated.in_a], rotated.b.W[rotated.in_b]
    torch.testing.assert_close(W_a @ W_a.T, W_b @ W_b.T, atol=1e-5, rtol=0)
    assert (W_a * W_b).sum(1).abs().mean() < 0.4


def test_changed_frequency_and_magnitudes():
    pair = related(TRUTH, shared=1, frequency="uniform", magnitudes="own")
    a, b = pair.sample(30_000)
    rate = (b.acts > 0).float().mean(0)
    assert rate.mean().item() == pytest.approx(4 / 64, rel=0.03)
    assert (rate - 4 / 64).abs().max() < 0.01
    fires_a, fires_b = (
        z[:, i] > 0 for z, i in ((a.acts, pair.in_a), (b.acts, pair.in_b))
    )
    both = (fires_a & fires_b).float().mean(0)
    most = torch.minimum(TRUTH.rates[pair.in_a], torch.tensor(4 / 64))
    assert (both - most).abs().max() < 0.015  # as much together as the rates allow
    together = fires_a & fires_b
    x, y = a.acts[:, pair.in_a][together], b.acts[:, pair.in_b][together]
    assert torch.corrcoef(torch.stack([x, y]))[0, 1].abs() < 0.05


def test_refuses_a_share_beyond_one():
    with pytest.raises(ValueError, match="between 0 and 1"):
        related(TRUTH, shared=1.5)
    with pytest.raises(ValueError, match="directions"):
        related(TRUTH, directions="bent")


def test_the_benchmark_at_a_small_scale():
    bench = SynthBench(1 / 64, orthogonal_steps=5)
    assert (bench.n, bench.d) == (256, 12)
    x, acts = bench.sample(3000)
    assert torch.equal(x[100:200], bench.rows(100, start=100))
    torch.testing.assert_close(x, acts @ bench.W + bench.b)
    roots = bench.model.hierarchy.roots
    assert len(roots) == 2 and len(roots[0].children) == 4
    children = [c.feature_index for c in roots[0].children]
    fires = acts > 0
    assert fires[:, children].sum(1).max() == 1  # exclusive
    assert (fires[:, children].any(1) <= fires[:, roots[0].feature_index]).all()
    firing = acts[fires]
    assert 4 < firing.mean() < 5.2
    l0 = fires.sum(1).float().mean().item()
    assert l0 == pytest.approx(bench.rates.sum().item(), rel=0.05)


def test_the_published_configuration_has_the_published_l0():
    bench = SynthBench(orthogonal_steps=0, rate_rows=1024)
    assert (bench.n, bench.d) == (16_384, 768)
    l0 = (bench.sample(1024).acts > 0).sum(1).float().mean().item()
    assert l0 == pytest.approx(34, abs=1.5)
