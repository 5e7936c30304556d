"""Two models with a known share in common, and the benchmark rebuilt."""

import pytest
import torch

from saeutils.firing import both_above
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


def test_changed_covariance_keeps_all_but_who_fires_together():
    """Features fire in b in blocks; with a's as often as two normals allow."""
    truth = Synthetic(SyntheticConfig(n=64, d=32, l0=6, frequency="uniform"))
    plain = related(truth, shared=0.5)
    pair = related(truth, shared=0.5, correlation=0.5)
    assert torch.equal(pair.in_a, plain.in_a) and torch.equal(pair.b.W, plain.b.W)
    a, b = pair.sample(40_000)
    assert torch.equal(a.rows, truth.rows(40_000))
    fires, rates = (b.acts > 0).float(), pair.b.rates
    error = (rates * (1 - rates) / 40_000).sqrt()
    assert ((fires.mean(0) - rates).abs() < 4.5 * error).all()
    c = torch.corrcoef(fires.T)
    block = pair.b.law.block
    tied = (block[:, None] == block) & ~torch.eye(64, dtype=torch.bool)
    assert c[tied].mean().item() == pytest.approx(0.5, abs=0.02)
    assert c[block[:, None] != block].abs().mean() < 0.02
    # The same law as `firing` draws by itself, which self_check holds to the formula.
    alone = pair.b.self_check(20_000)
    assert alone.tied[0] == pytest.approx(0.5, abs=0.02) and alone.tied[1] < 0.02
    together = ((a.acts[:, pair.in_a] > 0) & (b.acts[:, pair.in_b] > 0)).float().mean()
    limit = -torch.special.ndtri(rates[pair.in_b])
    rho = (1 - pair.b.law.factor[pair.in_b, 0] ** 2).sqrt()
    expected = both_above(limit, limit, rho).mean().item()
    assert together.item() == pytest.approx(expected, rel=0.03)
    assert expected < 0.8 * rates.mean()  # fire apart more often than in `plain`


def test_correlation_and_frequency_change_together():
    pair = related(TRUTH, shared=1, frequency="uniform", correlation=0.3)
    _, b = pair.sample(30_000)
    assert ((b.acts > 0).float().mean(0) - 4 / 64).abs().max() < 0.01


def test_refuses_a_share_beyond_one():
    with pytest.raises(ValueError, match="0 ≤ correlation < 1"):
        related(TRUTH, correlation=1)
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
