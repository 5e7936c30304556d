"""Refinement finds more than it was given, undoes absorption, and invents nothing."""

import pytest
import torch

from saeutils import recovery as R
from saeutils.absorption import chance_cosine, take_apart
from saeutils.baselines import Dictionary
from saeutils.refinement import (
    best_threshold,
    fit_encoder,
    refine,
    sums,
    update_atoms,
    with_l0,
)
from saeutils.regrouping import cofiring, crowds, regroup, simple
from saeutils.sae import load, save
from saeutils.sparse_coding import SparseCoder, SparseCodes, lasso
from saeutils.synthetic import Synthetic, SyntheticConfig

SIZES = dict(n=64, d=32, l0=3, largest=0.2, frequency="uniform")
TRUTH = Synthetic(SyntheticConfig(**SIZES))
ROWS = TRUTH.rows(8000)


def damaged(truth, angle=0.5, missing=6):
    """The truth, bent by noise, with some atoms replaced by noise."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(truth.n, truth.d, generator=generator) / truth.d**0.5
    W = truth.W + angle * noise
    W[:missing] = noise[:missing]
    return Dictionary(torch.nn.functional.normalize(W, dim=1), truth.b, 4, signed=False)


def test_refinement_recovers_a_damaged_dictionary():
    start = damaged(TRUTH)
    before = R.recovery(start, TRUTH, rows=2000)
    out = refine(start, ROWS, rounds=12, batch=4000)
    after = R.recovery(out.coder, TRUTH, rows=2000)
    assert before.share(0.95) < 0.5
    assert after.share(0.95) > 0.85 and after.f1.mean() > 0.85
    assert out.history["fvu"].iloc[-1] < 0.02 < out.history["fvu"].iloc[0]
    again = refine(start, ROWS, rounds=12, batch=4000)
    assert torch.equal(again.coder.W_dec, out.coder.W_dec)
    torch.testing.assert_close(out.coder.W_dec.norm(dim=1), torch.ones(64))


def test_the_fitted_encoder_is_a_sae_lens_sae(tmp_path):
    coder = SparseCoder(TRUTH.W, TRUTH.b)
    sae = fit_encoder(coder, ROWS)
    found = R.recovery(sae, TRUTH, rows=2000)
    naive = R.recovery(Dictionary(TRUTH.W, TRUTH.b, 3, signed=False), TRUTH, rows=2000)
    oracle = R.recovery(coder, TRUTH, rows=2000)
    assert naive.f1.mean() < found.f1.mean() < oracle.f1.mean()
    assert found.r2 > 0.7 and found.l0 == pytest.approx(3, rel=0.3)
    x = TRUTH.rows(50, seed=4)
    opened = load(save(sae, tmp_path / "sae"))
    torch.testing.assert_close(opened.encode(x), sae.encode(x))


def absorbed(truth, angle=1.0):
    """The truth with each child's atom merged with its parent's."""
    parent = truth.law.parent
    child = parent >= 0
    W = truth.W.clone()
    W[child] = W[child] + angle * W[parent[child]]
    return torch.nn.functional.normalize(W, dim=1)


def test_absorbed_atoms_are_taken_apart():
    truth = Synthetic(
        SyntheticConfig(n=96, d=96, l0=5, firing="hierarchy", group=3, largest=0.3)
    )
    x, W = truth.rows(20_000), absorbed(truth)
    codes = SparseCoder(W, truth.b).sparse(x - truth.b)
    left = x - truth.b - codes.times(W)
    apart, changed = take_apart(W, codes, left, least=0.1)
    assert R.recovery(W, truth).share() < 0.3
    assert R.recovery(apart, truth).share() > 0.95
    assert changed == pytest.approx(72, abs=4)


def test_features_that_are_really_close_are_left_alone():
    """Clusters at cosine 0.5 that fire independently look alike, but are not merged."""
    truth = Synthetic(SyntheticConfig(n=96, d=64, l0=4, geometry="clustered"))
    x = truth.rows(20_000)
    codes = SparseCoder(truth.W, truth.b).sparse(x - truth.b)
    left = x - truth.b - codes.times(truth.W)
    W, changed = take_apart(truth.W, codes, left, least=0.1)
    assert changed == 0 and torch.equal(W, truth.W)


def test_chance_cosine_is_what_random_directions_reach():
    generator = torch.Generator().manual_seed(0)
    for m, d in ((200, 16), (512, 128)):
        above = []
        for _ in range(20):
            W = torch.nn.functional.normalize(
                torch.randn(m, d, generator=generator), dim=1
            )
            pairs = (W @ W.T).tril(-1)
            above.append((pairs > chance_cosine(m, d)).sum().item())
        assert 0.4 < sum(above) / 20 < 2


def test_sums_and_atom_updates_are_the_exact_ones():
    x = ROWS[:500]
    start = damaged(TRUTH).W_dec
    codes = lasso(x, start, 0.2)
    z = codes.dense(64)
    A, B, used = sums(codes, x, 64)
    torch.testing.assert_close(A, z.T @ z, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(B, z.T @ x, atol=1e-3, rtol=1e-4)
    assert torch.equal(used, (z > 0).sum(0))
    # One atom: its best direction is B_j − A_j W + A_jj W_j.
    slow = start.clone()
    for j in range(64):
        if A[j, j] > 0:
            step = slow[j] + (B[j] - A[j] @ slow) / A[j, j]
            slow[j] = step / step.norm()
    torch.testing.assert_close(
        update_atoms(start, A, B, sweeps=1), slow, atol=1e-4, rtol=0
    )
    errors = [(x - z @ update_atoms(start, A, B, s)).square().sum() for s in (0, 1, 5)]
    assert errors[0] > errors[1] >= errors[2]


def test_best_threshold_by_trying_them_all():
    generator = torch.Generator().manual_seed(3)
    score = torch.randn(60, 4, generator=generator)
    fires = score + torch.randn(60, 4, generator=generator) > 0.8

    def f1(t, column):
        said = score[:, column] > t
        hits = (said & fires[:, column]).sum()
        return (2 * hits / (said.sum() + fires[:, column].sum())).item()

    found = best_threshold(score, fires)
    for column in range(4):
        best = max(f1(t, column) for t in torch.linspace(0, 3, 3001))
        assert f1(found[column], column) == pytest.approx(best, abs=1e-6)


def test_refuses_what_does_not_fit():
    start = damaged(TRUTH)
    with pytest.raises(ValueError, match="hook point"):
        refine(start, torch.randn(10, 5))
    with pytest.raises(ValueError, match="rounds"):
        refine(start, ROWS, rounds=0)
    silent = Dictionary(start.W_dec, start.b_dec, 0)
    with pytest.raises(ValueError, match="does not fire"):
        refine(silent, ROWS)


def test_with_l0_fires_as_often_as_asked():
    from saeutils.training import TrainConfig, train

    config = TrainConfig(
        "l1", 64, l1_coefficient=0.5, steps=200, batch_size=256, lr=1e-2
    )
    sae = train(ROWS, config, progress=False).sae
    cut = with_l0(sae, ROWS, 2.5)
    x = ROWS[:8000]
    z, before = cut.encode(x), sae.encode(x)
    assert (z > 0).sum(1).float().mean().item() == pytest.approx(2.5, abs=0.01)
    torch.testing.assert_close(z, before * (z > 0))
    with pytest.raises(ValueError, match="fewer than"):
        with_l0(sae, ROWS, 63)


GROUPS = Synthetic(
    SyntheticConfig(n=64, d=64, l0=4, firing="correlated", correlation=0.5)
)


def merged_groups(truth):
    """Of each block one atom in the middle; the next bent; the last one lost."""
    W = truth.W.clone()
    for first in range(0, truth.n, 8):
        block = truth.W[first : first + 8]
        W[first + 7] = block.sum(0)
        W[first] = block[0] - 0.3 * block[1:].sum(0)
        W[first + 1] = block[1] + block[7]
    return torch.nn.functional.normalize(W, dim=1)


def test_groups_that_fire_together_are_learned_anew():
    x, W = GROUPS.rows(8000), merged_groups(GROUPS)
    codes = SparseCoder(W, GROUPS.b).sparse(x - GROUPS.b)
    left = x - GROUPS.b - codes.times(W)
    out, changed = regroup(W, codes, left, 0.15)
    assert R.recovery(W, GROUPS).share(0.95) < 0.7 and changed >= 1
    assert R.recovery(out, GROUPS).share(0.95) > 0.85
    start = Dictionary(W, GROUPS.b, 5, signed=False)
    shares = [
        R.recovery(
            refine(start, x, rounds=8, batch=4000, groups=g, encoder=False).coder.W_dec,
            GROUPS,
        ).share()
        for g in (False, True)
    ]
    assert shares[0] < 0.9 and shares[1] > 0.98


def test_regrouping_leaves_the_truth_and_independent_atoms_alone():
    for truth in (GROUPS, TRUTH):
        x = truth.rows(8000)
        codes = SparseCoder(truth.W, truth.b).sparse(x - truth.b)
        out, changed = regroup(truth.W, codes, x - codes.times(truth.W), 0.15)
        assert changed == 0 and torch.equal(out, truth.W)


def test_firing_together_is_the_correlation_of_firing():
    import numpy as np

    z = torch.rand(300, 6, generator=torch.Generator().manual_seed(0))
    z = z * (z > 0.6)
    z[:, 1] = z[:, 0]
    codes = SparseCodes(torch.arange(6).expand(300, 6), z)
    together, used = cofiring(codes, 6)
    expected = torch.from_numpy(np.corrcoef((z > 0).numpy().T)).fill_diagonal_(0)
    torch.testing.assert_close(together, expected.float(), atol=1e-5, rtol=0)
    assert used.tolist() == (z > 0).sum(0).tolist()


def test_crowds_are_the_directions_that_recur_and_sums_are_no_crowd():
    generator = torch.Generator().manual_seed(1)
    W = torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
    z = torch.rand(400, 3, generator=generator) + 0.5
    z[:90, 1:] = 0  # 90 rows of the first alone, 60 of the second, 30 of the third
    z[90:150, [0, 2]] = 0
    z[150:180, :2] = 0
    found = crowds(z @ W, 6)  # the middle of the mixed rows may be among them
    found = found[simple(found)]
    assert len(found) == 3
    assert ((found @ W.T).amax(0) > 0.99).all()
    total = torch.nn.functional.normalize(W.sum(0, keepdim=True), dim=1)
    assert simple(torch.cat([total, W])) == [1, 2, 3]
