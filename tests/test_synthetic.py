"""The generator does what it says: laws against their own formula, and sae_lens'."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from saeutils import firing
from saeutils.synthetic import Synthetic, SyntheticConfig
from saeutils.training import TrainConfig, train

SMALL = dict(n=128, d=32, l0=6)
LAWS = {
    "independent": dict(),
    "uniform": dict(frequency="uniform"),
    "decay": dict(frequency="decay"),
    "correlated": dict(firing="correlated", correlation=0.5),
    "weakly correlated": dict(firing="correlated", correlation=0.2, group=4),
    "low-rank": dict(firing="low-rank"),
    "groups": dict(firing="groups"),
    "exclusive": dict(firing="exclusive"),
    "hierarchy": dict(firing="hierarchy", group=3, largest=0.2),
    "composed": dict(firing="composed", group=4, largest=0.4),
    "clustered, noisy": dict(geometry="clustered", noise=0.1),
}
every_law = pytest.mark.parametrize("options", LAWS.values(), ids=LAWS)


@every_law
def test_achieves_what_was_asked_for(options):
    """The tolerances of the issue, over every law."""
    truth = Synthetic(SyntheticConfig(**SMALL | options))
    report = truth.self_check(60_000)
    assert report.l0_target == pytest.approx(6, rel=1e-4)
    assert abs(report.l0_error) < 0.02
    assert report.rate_z < 5
    assert report.unused == report.saturated == 0
    assert report.l0_sd[1] == pytest.approx(report.l0_sd[0], rel=0.02)
    assert report.tied[1] < 0.02 and report.untied < 0.02 and report.pair_z < 5
    assert abs(report.repeated - report.repeated_expected) < 0.005
    assert report.noise == pytest.approx(options.get("noise", 0), rel=0.02)
    assert f"{report.rows:,}" in str(report)


def test_a_block_correlates_as_asked():
    """Of all pairs in a block, the mean is the correlation that was asked for."""
    truth = Synthetic(SyntheticConfig(**SMALL, firing="correlated", correlation=0.6))
    fires = (truth.sample(60_000).acts > 0).double()
    c = torch.corrcoef(fires.T)
    same = torch.arange(128)[:, None] // 8 == torch.arange(128) // 8
    off_diagonal = same & ~torch.eye(128, dtype=torch.bool)
    assert abs(c[off_diagonal].mean() - 0.6) < 0.02
    assert c[~same].abs().mean() < 0.02


@every_law
def test_every_pair_correlates_as_asked(options):
    """Not the mean of many: each pair by itself, where rates are large enough."""
    shape = dict(n=32, d=16, l0=4, frequency="uniform", largest=0.5, group=4)
    if options.get("firing") == "hierarchy":
        shape |= dict(group=3)
    truth = Synthetic(SyntheticConfig(**options | shape | dict(chance=0.5)))
    fires = (truth.sample(100_000).acts > 0).double()
    i, j = torch.triu_indices(32, 32, 1)
    p = truth.rates.double()
    asked = firing.phi(p[i], p[j], truth.law.joint(i, j).double())
    assert (torch.corrcoef(fires.T)[i, j] - asked).abs().max() < 0.02


def test_coherence_is_that_of_random_directions():
    """The mean largest |cosine| with n − 1 others, whose squares are Beta."""
    from scipy.stats import beta

    report = Synthetic(SyntheticConfig(n=512, d=64, l0=6)).self_check(500)
    t = np.linspace(0, 1, 20_001)
    expected = np.trapezoid(1 - beta.cdf(t**2, 0.5, 63 / 2) ** 511, t)
    assert report.coherence[0] == pytest.approx(expected, rel=0.01)
    assert report.coherence[0] < report.coherence[1] < 1


def test_copula_agrees_with_sae_lens():
    """The same correlation matrix gives the same joint firing."""
    from sae_lens.synthetic import ActivationGenerator

    truth = Synthetic(SyntheticConfig(n=16, d=8, l0=4, largest=0.5, firing="low-rank"))
    law = truth.law
    matrix = law.factor @ law.factor.T
    theirs = ActivationGenerator(
        16, law.rates, correlation_matrix=matrix.fill_diagonal_(1)
    )
    torch.manual_seed(0)
    a = (theirs.sample(100_000) > 0).double()
    b = (truth.sample(100_000).acts > 0).double()
    i, j = torch.triu_indices(16, 16, 1)
    expected = law.joint(i, j).double()
    for fires in (a, b):
        both = (fires.T @ fires / len(fires))[i, j]
        assert (both - expected).abs().max() < 0.006


def test_both_above_has_known_values():
    zero = torch.zeros(3)
    rho = torch.tensor([0.0, 0.5, -0.5])
    # P(x > 0, y > 0) = 1/4 + asin(ρ) / 2π
    expected = [0.25 + math.asin(r) / (2 * math.pi) for r in rho.tolist()]
    assert firing.both_above(zero, zero, rho).tolist() == pytest.approx(
        expected, abs=1e-7
    )
    one = torch.ones(1)
    tail = torch.special.ndtr(-one.double()).item()
    assert firing.both_above(one, one, one).item() == pytest.approx(tail, abs=1e-4)


@given(
    n=st.integers(10, 300),
    share=st.floats(0.01, 0.99),
    frequency=st.sampled_from(["uniform", "zipf", "decay"]),
)
def test_rates_fall_sum_and_stay_below_the_largest(n, share, frequency):
    l0 = share * n * 0.3
    p = firing.rates(n, l0, frequency, largest=0.3)
    assert p.sum().item() == pytest.approx(l0, rel=1e-4)
    assert (p > 0).all() and p.max() <= 0.3 * (1 + 1e-5)
    assert (p[1:] <= p[:-1] * (1 + 1e-6)).all()


def test_structure_holds_on_every_row():
    hierarchy = Synthetic(SyntheticConfig(**SMALL | LAWS["hierarchy"]))
    fires = hierarchy.sample(5000).acts > 0
    parent = hierarchy.law.parent
    child = (parent >= 0).nonzero().flatten()
    assert (fires[:, child] <= fires[:, parent[child]]).all()
    per_parent = torch.zeros(5000, 128).index_add_(
        1, parent[child], fires[:, child].float()
    )
    assert per_parent.max() == 1
    share = fires[:, child].sum() / fires[:, parent == -1].sum()
    assert share.item() == pytest.approx(0.8, abs=0.02)

    composed = Synthetic(SyntheticConfig(**SMALL | LAWS["composed"]))
    fires = (composed.sample(5000).acts > 0).reshape(5000, 16, 2, 4).sum(3)
    assert fires.max() == 1 and (fires[:, :, 0] == fires[:, :, 1]).all()

    exclusive = Synthetic(SyntheticConfig(**SMALL, firing="exclusive"))
    fires = exclusive.sample(5000).acts > 0
    per_set = fires.float() @ torch.nn.functional.one_hot(exclusive.law.group).float()
    assert per_set.max() == 1


def test_groups_are_drawn_for_each_row():
    """The classic bug: one draw for the whole batch."""
    truth = Synthetic(SyntheticConfig(**SMALL, firing="groups"))
    fires = truth.sample(4000).acts > 0
    drawn = fires.float() @ torch.nn.functional.one_hot(truth.law.group).float() > 0
    assert len(drawn.unique(dim=0)) > 500


@pytest.mark.parametrize("kind", ["constant", "uniform", "half-normal", "normal"])
def test_magnitudes(kind):
    acts = Synthetic(SyntheticConfig(**SMALL, magnitude=kind)).sample(5000).acts
    a = acts[acts != 0]
    mean = math.sqrt(2 / math.pi) if kind == "half-normal" else 1
    sd = {"constant": 0, "uniform": 12**-0.5, "normal": 0.25}.get(kind)
    sd = math.sqrt(1 - 2 / math.pi) if sd is None else sd
    assert (a > 0).all()
    assert a.mean().item() == pytest.approx(mean, abs=0.01)
    assert a.std().item() == pytest.approx(sd, abs=0.01)


def test_rows_are_what_the_acts_say():
    truth = Synthetic(SyntheticConfig(**SMALL, bias=2.0))
    x, acts = truth.sample(300, start=17)
    torch.testing.assert_close(x, truth.b + acts @ truth.W)
    torch.testing.assert_close(truth.W.norm(dim=1), torch.ones(128))
    assert truth.b.norm().item() == pytest.approx(2)


@given(start=st.integers(0, 9000), rows=st.integers(1, 5000))
def test_any_part_of_the_stream_is_the_same(start, rows):
    truth = Synthetic(SyntheticConfig(n=16, d=4, l0=2, largest=0.5))
    whole = truth.rows(14_000, seed=3)
    part = truth.rows(rows, seed=3, start=start)
    assert torch.equal(part, whole[start : start + rows])


def test_seeds_and_streams_differ():
    truth = Synthetic(SyntheticConfig(**SMALL))
    again = Synthetic(SyntheticConfig(**SMALL))
    other = truth.with_(seed=1)
    assert torch.equal(truth.W, again.W) and torch.equal(truth.rows(9), again.rows(9))
    assert not torch.equal(truth.rows(9), truth.rows(9, seed=1))
    assert not torch.equal(truth.W, other.W)


def test_a_stream_is_a_store_without_rows():
    truth = Synthetic(SyntheticConfig(n=64, d=16, l0=4))
    stream = truth.stream(10**9, seed=2)
    x = truth.rows(6000, seed=2)
    assert len(stream) == 10**9
    assert torch.equal(stream[4000:4200], x[4000:4200])
    assert torch.equal(stream.gather([5999, 1, 5000]), x[[5999, 1, 5000]])
    batches = list(stream.batches(100, steps=5, start=3))
    assert torch.equal(batches[0].rows, x[300:400]) and len(batches) == 2
    assert stream.fingerprint != truth.stream(10**9, seed=3).fingerprint
    around = list(truth.stream(150, seed=2).batches(100, steps=2))[1]
    assert torch.equal(around.rows, torch.cat([x[100:150], x[:50]]))
    with pytest.raises(IndexError):
        stream.gather([10**9])
    whole = [b.rows for b in truth.stream(250, seed=2).batches(100)]
    assert torch.equal(torch.cat(whole), x[:250])  # the last batch is short
    ranks = [next(stream.batches(50, steps=1, rank=r, world_size=2)) for r in (0, 1)]
    assert torch.equal(torch.cat([b.rows for b in ranks]), x[:100])


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(shuffle="buffer"), ValueError, "as random as any"),
        (dict(workers=-1), ValueError, "negative"),
        (dict(start=-1), ValueError, "negative"),
        (dict(rank=1), ValueError, "rank"),
        (dict(block=5), TypeError, "block"),
    ],
)
def test_a_stream_refuses_what_it_cannot_do(options, error, message):
    """At once, not at the first batch."""
    stream = Synthetic(SyntheticConfig(n=64, d=16, l0=4)).stream(100)
    with pytest.raises(error, match=message):
        stream.batches(10, **options)


def test_training_reads_a_stream():
    truth = Synthetic(SyntheticConfig(n=64, d=16, l0=3))
    config = TrainConfig("topk", 64, 3, steps=150, batch_size=256, lr=3e-3)
    result = train(truth.stream(10**8), config, progress=False)
    assert result.history["fvu"].iloc[-1] < 0.5


def test_geometry():
    wide = Synthetic(SyntheticConfig(n=32, d=64, l0=3, geometry="orthogonal"))
    torch.testing.assert_close(wide.W @ wide.W.T, torch.eye(32), atol=1e-5, rtol=0)
    pushed = Synthetic(SyntheticConfig(**SMALL, geometry="orthogonal")).self_check(500)
    random = Synthetic(SyntheticConfig(**SMALL)).self_check(500)
    assert pushed.coherence[1] < random.coherence[0]
    W = Synthetic(SyntheticConfig(n=800, d=256, l0=3, geometry="clustered")).W
    cosine = (W @ W.T).fill_diagonal_(0)
    # Features cluster, not dimensions: each has 7 partners at cosine 0.5.
    top = cosine.topk(8, dim=1).values
    assert abs(top[:, :7].mean() - 0.5) < 0.03 and top[:, 7].max() < 0.4


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(l0=80), "cannot fire"),
        (dict(firing="nothing"), "none of"),
        (dict(frequency="nothing"), "none of"),
        (dict(firing="hierarchy"), "multiples of 9"),
        (dict(firing="groups", chance=0.05), "chance"),
        (dict(firing="low-rank", scale=0.3), "scale must be below"),
        (dict(firing="exclusive", l0=40, largest=0.9, group=64), "more than once"),
        (dict(firing="correlated", correlation=1), "correlation"),
        (dict(noise=-1), "noise"),
    ],
)
def test_refuses_contradictions(options, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**SMALL | options)


def test_check_notices_a_broken_law():
    """The bug of earlier generators: who fires is drawn once a block."""

    class OncePerBlock(firing.Independent):
        def draw(self, rows, generator):
            return super().draw(1, generator).expand(rows, -1)

    truth = Synthetic(SyntheticConfig(**SMALL))
    truth.law = OncePerBlock(truth.law.rates)
    report = truth.self_check(20_000)
    assert report.repeated > 0.99 and report.rate_z > 5 and report.unused > 0
    assert report.pair_z > 5


def test_check_notices_features_that_fire_together():
    """Every rate right, but all follow one number a row: L0 is 0 or many."""

    class AllAtOnce(firing.Independent):
        def draw(self, rows, generator):
            return torch.rand(rows, 1, generator=generator) < self.rates

    truth = Synthetic(SyntheticConfig(**SMALL))
    truth.law = AllAtOnce(truth.law.rates)
    report = truth.self_check(20_000)
    assert report.rate_z < 5 and abs(report.l0_error) < 0.1
    assert report.pair_z > 50 and report.l0_sd[1] > 3 * report.l0_sd[0]


def test_check_of_many_features_samples_the_pairs():
    small, large = (
        Synthetic(
            SyntheticConfig(n=n, d=8, l0=6, frequency="uniform", firing="exclusive")
        ).self_check(20_000)
        for n in (128, 1024)
    )
    for report in (small, large):
        assert report.l0_sd[1] == pytest.approx(report.l0_sd[0], rel=0.02)
