"""Parents of planted children, stitching against the obvious way, absorbed concepts."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from torch.nn.functional import normalize

from saeutils import absorption, concept_splits, family_tree, splitting, stitching
from saeutils.splitting import Coded, Parents
from saeutils.store import TensorStore


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(z, W_dec, b_dec=None):
    z = sparse.csr_array(np.asarray(z, np.float32))
    return Coded(z, W_dec, torch.zeros(W_dec.shape[1]) if b_dec is None else b_dec)


def random_sae(n=60, m=9, d=5, seed=0, rate=0.4):
    """Codes, decoder and bias without any sense, and rows."""
    z = normal(n, m, seed=seed).relu() * (normal(n, m, seed=seed + 1) < rate)
    return coded(z, normal(m, d, seed=seed + 2), normal(d, seed=seed + 3))


class ReLU:
    """An SAE by hand, with the names of a sae_lens one."""

    def __init__(self, W, b):
        self.W_dec, self.b_dec = W, b

    def encode(self, x):
        return ((x - self.b_dec) @ self.W_dec.T - 0.5).relu()


def parts(n=400, d=16, children=3, seed=0):
    """Two parents; each fires with exactly one of its children in the large SAE."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(2 * children, (n,), generator=generator)
    silent = torch.rand(n, generator=generator) < 0.3
    large = torch.nn.functional.one_hot(which, 2 * children).float()
    large[silent] = 0
    small = torch.stack([large[:, :children].sum(1), large[:, children:].sum(1)], 1)
    W = normalize(normal(2, d, seed=seed), dim=1)
    own = 0.3 * normal(2 * children, d, seed=seed + 1) / d**0.5
    W_large = normalize(W.repeat_interleave(children, 0) + own, dim=1)
    return coded(small, W), coded(large, W_large)


# --- codes --------------------------------------------------------------------


def test_codes_are_those_of_the_sae_however_they_are_cut():
    sae, x = ReLU(normal(7, 4), normal(4, seed=1)), normal(33, 4, seed=2)
    whole = splitting.code(sae, x)
    cut = splitting.code(sae, TensorStore(x), budget=4 * 7 * 5)
    np.testing.assert_allclose(whole.z.toarray(), sae.encode(x), atol=1e-5)
    np.testing.assert_allclose(whole.z.toarray(), cut.z.toarray(), atol=1e-5)
    z = sae.encode(x)
    assert whole.counts.tolist() == (z > 0).sum(0).tolist()
    assert whole.l0 == pytest.approx((z > 0).sum(1).double().mean().item())
    torch.testing.assert_close(
        whole.decode(slice(3, 9)), (z @ sae.W_dec)[3:9] + sae.b_dec
    )
    missed = (x - z @ sae.W_dec - sae.b_dec).square().sum() / (
        x - x.mean(0)
    ).square().sum()
    assert whole.fvu(x) == pytest.approx(missed.item(), rel=1e-5)
    even = np.arange(33) % 2 == 0
    np.testing.assert_array_equal(whole.take(even).z.toarray(), whole.z.toarray()[even])


def test_rows_of_another_width_are_refused():
    sae = ReLU(normal(7, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="d_in = 5"):
        splitting.code(sae, normal(3, 5))


# --- parents ------------------------------------------------------------------


def test_planted_parents_are_found_both_ways():
    small, large = parts()
    truth = [0, 0, 0, 1, 1, 1]
    kin = splitting.kin(small, large)
    assert kin.by_cosine.parent.tolist() == kin.by_firing.parent.tolist() == truth
    row = kin.agree(0.5, kin)
    assert row["same parent"] == row["found again"] == 1 > row["by chance"]
    assert row["at equal rates"] == pytest.approx(1)


def test_the_slope_of_firing_is_what_it_says():
    a = random_sae(n=80, m=5, seed=3)
    b = random_sae(n=80, m=7, seed=9)
    found = splitting.parents_by_firing(a, b)
    p, q = (c.fires.toarray() > 0 for c in (a, b))
    slope = np.array(
        [
            [p[q[:, j], i].mean() - p[~q[:, j], i].mean() for j in range(7)]
            for i in range(5)
        ]
    )
    best = slope.argmax(0)
    known = slope.max(0) > 0
    np.testing.assert_array_equal(found.parent[known], best[known])
    np.testing.assert_allclose(found.score[known], slope.max(0)[known], rtol=1e-5)
    assert (found.parent[~torch.from_numpy(known)] == -1).all()


def test_a_latent_that_always_fires_is_nobodys_parent_and_a_dead_one_nobodys_child():
    child = np.arange(20) % 4 == 0
    small = coded(
        np.stack([np.ones(20), child | (np.arange(20) == 1)], 1), normal(2, 3)
    )
    large = coded(np.stack([child, np.zeros(20)], 1), normal(2, 3))
    found = splitting.parents_by_firing(small, large)
    assert found.parent.tolist() == [1, -1]
    assert found.score[1].isnan()


def test_parents_by_cosine_do_not_depend_on_the_blocks():
    a, b = normal(11, 6), normal(50, 6, seed=1)
    one = splitting.parents_by_cosine(a, b)
    two = splitting.parents_by_cosine(a, b, budget=4 * 11 * 3)
    assert (one.parent == two.parent).all()
    cosine = normalize(b, dim=1) @ normalize(a, dim=1).T
    torch.testing.assert_close(two.score, cosine.amax(1))
    with pytest.raises(ValueError, match="nothing to compare"):
        splitting.parents_by_cosine(a, normal(0, 6))


def test_at_equal_rates_only_the_rates_are_matched():
    generator = torch.Generator().manual_seed(0)
    rate = torch.rand(5000, generator=generator, dtype=torch.float64)
    like = 0.5 + 0.5 * torch.rand(3000, generator=generator, dtype=torch.float64)
    assert splitting.at_rates(rate, rate, rate) == pytest.approx(0.5, abs=0.01)
    assert splitting.at_rates(rate, rate, like) == pytest.approx(0.75, abs=0.01)
    assert splitting.at_rates(rate < 0.2, rate, like) == 0
    few = torch.tensor([0.6], dtype=torch.float64)
    assert splitting.at_rates(few, few, like) == pytest.approx(0.6)


def test_chance_agreement_is_what_dealing_gives():
    generator = np.random.default_rng(0)
    p, q = (generator.choice(6, 4000, p=np.arange(1, 7) / 21) for _ in range(2))
    one, other = (Parents(torch.from_numpy(v), torch.ones(4000)) for v in (p, q))
    found = splitting.agreement(one, other)
    assert found.share == pytest.approx(found.chance, abs=0.03)
    assert splitting.agreement(one, one).share == 1
    none = splitting.agreement(one, other, torch.zeros(4000, dtype=torch.bool))
    assert none.n == 0 and np.isnan(none.share)
    dealt = splitting.shuffled(one)
    assert sorted(dealt.parent.tolist()) == sorted(p.tolist())
    assert (dealt.parent != one.parent).any()


# --- concepts and trees -------------------------------------------------------


def test_firing_scores_and_main_latents_of_a_concept_in_two_halves():
    n = 60
    label = np.arange(n) < 20
    z = np.zeros((n, 4))
    z[:10, 0] = z[10:20, 1] = 1  # the concept, split in two
    z[15:30, 2] = 1  # half of it is something else
    sae = coded(z, normal(4, 3))
    scores = splitting.firing_scores(sae, label[:, None])
    np.testing.assert_allclose(scores.precision[0], [1, 1, 1 / 3, 0])
    np.testing.assert_allclose(scores.recall[0], [0.5, 0.5, 0.25, 0])
    assert scores.f1[0, 0] == pytest.approx(2 / 3)
    assert sorted(splitting.main_latents(sae, label)) == [0, 1]
    assert splitting.main_latents(sae, label, most=1) == [0]
    with pytest.raises(ValueError, match="no row"):
        splitting.main_latents(sae, np.zeros(n, bool))
    with pytest.raises(ValueError, match="codes of 60"):
        splitting.firing_scores(sae, label[:9, None])


def test_the_tree_of_a_planted_family():
    small, large = parts()
    tokens = np.array([f"w{j}" for j in range(7)])
    which = np.where(large.z.sum(1) > 0, large.z.toarray().argmax(1), 6)
    labels = np.stack([which < 3, which == 1], 1)
    parents = [splitting.parents_by_firing(small, large)]
    found = family_tree.tree(
        {"a": small, "b": large},
        parents,
        0,
        tokens[which],
        labels,
        ["x", "y"],
        most=[5],
    )
    root, *children = found
    assert (root.concept, root.precision, root.recall) == ("x", 1, 1)
    assert set(root.words[:3]) == {"w0", "w1", "w2"}
    assert sorted(c.latent for c in children) == [0, 1, 2]
    assert sum(c.share for c in children) == pytest.approx(1)
    assert [c.share for c in children] == sorted(
        (c.share for c in children), reverse=True
    )
    middle = next(c for c in children if c.latent == 1)
    assert (middle.concept, middle.words, middle.above) == ("y", ("w1",), 0)
    assert 0.5 < middle.cosine < 1


def test_words_of_a_child_are_those_that_it_has_more_of_than_its_parent():
    kind = np.array([0] * 50 + [1] * 30 + [2] * 20 + [3] * 100)
    parent = coded((kind < 3)[:, None], normal(1, 3))
    child = np.zeros(200)
    child[:25] = child[50:80] = 1  # half of 0, all of 1
    small, large = {"a": parent}, coded(child[:, None], normal(1, 3))
    parents = [Parents(torch.tensor([0]), torch.ones(1))]
    facts = np.array(["x", "y", "z", "o"])[kind], (kind == 1)[:, None], ["c"]
    found = family_tree.tree(small | {"b": large}, parents, 0, *facts, most=[1])
    assert found[0].words == ("x", "y", "z") and found[1].words == ("y", "x")
    assert found[1].share == pytest.approx(0.55)
    with pytest.raises(ValueError, match="every step"):
        family_tree.tree(small, parents, 0, *facts, most=[1])


# --- stitching ----------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_insertion_is_the_change_that_the_obvious_way_gives(seed):
    a, b = random_sae(seed=seed, m=6), random_sae(seed=seed + 50, m=8)
    x = normal(60, 5, seed=seed + 99)
    change = stitching.insertion(a, b, x, budget=4 * 5 * 7)
    total = (x - x.mean(0)).double().square().sum()
    for j in range(8):
        column = torch.from_numpy(b.z[:, [j]].toarray())
        after = a.decode(slice(None)) + column @ b.W_dec[[j]]
        fvu = (x - after).double().square().sum() / total
        assert change[j].item() == pytest.approx((fvu - a.fvu(x)).item(), abs=1e-4)


def test_a_missing_direction_is_novel_and_a_repeated_one_is_not():
    d, n = 8, 300
    truth = torch.eye(d)[:4]
    z = (normal(n, 4) > 0.5).float() * (1 + normal(n, 4, seed=1).abs())
    x = z @ truth
    base, donor = coded(z[:, :3], truth[:3]), coded(z[:, [0, 3]], truth[[0, 3]])
    change = stitching.insertion(base, donor, x)
    assert change[0] > 0 > change[1]
    assert (base.fvu(x) + change[1]).item() == pytest.approx(0, abs=1e-5)
    wrong = stitching.insertion(base, donor, x, W_dec=-truth[[0, 3]])
    assert wrong[1] > 0
    steps = stitching.groups(base.W_dec, donor.W_dec)
    assert [s.kind for s in steps] == ["novel", "swap", "lost", "lost"]
    assert steps[0].into.tolist() == [1]
    assert (steps[1].out.tolist(), steps[1].into.tolist()) == ([0], [0])


def test_groups_hang_together_in_any_block_size():
    a, b = normal(12, 3), normal(30, 3, seed=1)
    wide = stitching.groups(a, b, above=0.9)
    narrow = stitching.groups(a, b, above=0.9, budget=4 * 12 * 4)
    assert [(s.kind, *s.out, -1, *s.into) for s in wide] == [
        (s.kind, *s.out, -1, *s.into) for s in narrow
    ]
    place = {("a", int(i)): k for k, s in enumerate(wide) for i in s.out}
    place |= {("b", int(j)): k for k, s in enumerate(wide) for j in s.into}
    assert len(place) == 42
    near = (normalize(b, dim=1) @ normalize(a, dim=1).T > 0.9).nonzero().tolist()
    assert near and all(place["b", j] == place["a", i] for j, i in near)


@pytest.mark.parametrize("order", stitching.ORDERS)
@pytest.mark.parametrize("points", [3, 500])
def test_a_path_begins_and_ends_at_the_two_saes(order, points):
    a, b = random_sae(m=6, seed=1), random_sae(m=11, seed=21)
    x = normal(60, 5, seed=7)
    steps = stitching.ordered(stitching.groups(a.W_dec, b.W_dec), order)
    path = stitching.path(a, b, x, steps, points=points, budget=4 * 5 * 13)
    assert path.fvu.iloc[0] == pytest.approx(a.fvu(x), rel=1e-5)
    assert path.fvu.iloc[-1] == pytest.approx(b.fvu(x), rel=1e-4)
    assert path.l0.iloc[[0, -1]].tolist() == pytest.approx([a.l0, b.l0])
    assert path.inserted.iloc[-1] == 11 and path.removed.iloc[-1] == 6
    assert len(path) <= points + 1


def test_a_path_in_the_middle_is_the_obvious_sum():
    a, b = random_sae(m=3, seed=1), random_sae(m=4, seed=21)
    x = normal(60, 5, seed=7)
    parents = Parents(torch.tensor([1, -1, 1, 0]), torch.ones(4))
    steps = stitching.families(parents, 3)
    assert [s.kind for s in steps] == ["swap", "swap", "lost", "novel"]
    path = stitching.path(a, b, x, steps, points=50)
    # After two of four steps: a's latent 2, b's latents 0, 2, 3, and 5 of 7 moved.
    t = 5 / 7
    z_a, z_b = (torch.from_numpy(c.z.toarray()) for c in (a, b))
    after = (1 - t) * a.b_dec + t * b.b_dec + z_a[:, [2]] @ a.W_dec[[2]]
    after += z_b[:, [0, 2, 3]] @ b.W_dec[[0, 2, 3]]
    fvu = (x - after).square().sum() / (x - x.mean(0)).square().sum()
    assert path.fvu.iloc[2] == pytest.approx(fvu.item(), rel=1e-4)
    l0 = ((z_a[:, [2]] > 0).sum() + (z_b[:, [0, 2, 3]] > 0).sum()) / 60
    assert path.l0.iloc[2] == pytest.approx(l0.item())


def test_true_families_lose_less_on_the_way_than_dealt_ones():
    small, large = parts(d=32)
    x = large.decode(slice(None)) + 0.01 * normal(400, 32, seed=5)
    ways = stitching.ways(small, large, splitting.kin(small, large))
    assert set(ways) == {*(f"families {w}" for w in ("by cosine", "by firing")),
                         "families dealt at random", "novel first"}  # fmt: skip
    worst = {n: stitching.path(small, large, x, s).fvu.max() for n, s in ways.items()}
    assert worst["families by cosine"] == worst["families by firing"]
    assert worst["families by firing"] < worst["families dealt at random"]


def test_bad_stitching_is_refused():
    a, b = random_sae(m=6), random_sae(m=7, seed=9)
    x = normal(60, 5)
    steps = stitching.groups(a.W_dec, b.W_dec)
    with pytest.raises(ValueError, match="do not move each latent"):
        stitching.path(a, b, x, steps[:-1])
    with pytest.raises(ValueError, match="codes of 60"):
        stitching.insertion(a, b, x[:50])
    with pytest.raises(ValueError, match="same rows"):
        stitching.insertion(a, random_sae(n=10), x)
    with pytest.raises(ValueError, match="none of"):
        stitching.ordered(steps, "alphabetical")
    with pytest.raises(ValueError, match="parents"):
        stitching.families(Parents(torch.tensor([3]), torch.ones(1)), 3)


# --- absorption ---------------------------------------------------------------


def absorbing(n=2000, d=24, share=0.25, seed=0):
    """A concept whose latent is silent on a kind of its own, which another carries."""
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(n, generator=generator) < 0.3
    kind = there & (torch.rand(n, generator=generator) < share)
    other = torch.rand(n, generator=generator) < 0.3
    p, c, o = torch.linalg.qr(normal(d, 3, seed=seed))[0].T
    x = there[:, None] * p + kind[:, None] * c + other[:, None] * o
    x = 3 * x + 0.05 * normal(n, d, seed=seed + 1)
    z = 3 * torch.stack([there & ~kind, kind, other], 1).float()
    return x, coded(z, torch.stack([p, p + c, o])), there.numpy(), kind.numpy()


def test_absorption_is_counted_exactly_where_it_was_planted():
    x, sae, there, kind = absorbing()
    probe = absorption.concept_probe(x, there)
    judged = there & probe.finds(x)
    assert judged.sum() > 0.99 * there.sum()
    assert splitting.main_latents(sae, there, most=1) == [0]
    found = absorption.absorption(sae.z, sae.W_dec, probe, judged, [0], above=0.2)
    assert found.rate == pytest.approx(kind[judged].mean())
    assert found.silent == pytest.approx(found.rate)
    assert set(found.rows.tolist()) == set(np.flatnonzero(kind & judged).tolist())
    assert (found.latents == 1).all()
    both = absorption.absorption(sae.z, sae.W_dec, probe, judged, [0, 1], above=0.2)
    assert both.rate == both.silent == 0
    none = absorption.absorption(sae.z, sae.W_dec, probe, there & False, [0])
    assert none.n == 0 and np.isnan(none.rate)


def test_a_silent_latent_alone_is_no_absorption():
    x, sae, there, kind = absorbing()
    probe = absorption.concept_probe(x, there)
    W = sae.W_dec.clone()
    W[1] = normalize(normal(24, seed=8) - 3 * probe.w / probe.w.norm(), dim=0)
    found = absorption.absorption(sae.z, W, probe, there, [0], above=0.2)
    assert found.silent == pytest.approx(kind[there].mean()) and found.rate == 0


def test_the_bound_on_the_cosine_is_that_of_chance():
    m, d = 400, 24
    cosine = normalize(normal(200 * m, d), dim=1)[:, 0].view(200, m)
    above = (cosine > absorption._one_of(m, d)).double().sum(1).mean()
    assert above.item() == pytest.approx(1, abs=0.25)


def test_bad_absorption_is_refused():
    x, sae, there, _ = absorbing(n=100)
    probe = absorption.concept_probe(x, there)
    with pytest.raises(ValueError, match="do not belong together"):
        absorption.absorption(sae.z, sae.W_dec, probe, there[:50], [0])
    with pytest.raises(ValueError, match="rows with the concept"):
        absorption.concept_probe(x, np.zeros(100, bool))


def test_matched_words_are_as_frequent_and_never_the_concept():
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, 301)
    token = generator.choice(300, 20_000, p=weights / weights.sum())
    label = np.isin(token, np.arange(5, 60, 7))
    null = absorption.matched_words(token, label)
    assert not (null & label).any()
    assert len(np.unique(token[null])) == len(np.unique(token[label]))
    assert 0.6 < null.sum() / label.sum() < 1.6
    assert (absorption.matched_words(token, label) == null).all()
    assert (absorption.matched_words(token, label, seed=1) != null).any()
    with pytest.raises(ValueError, match="partners"):
        absorption.matched_words(token, np.ones(20_000, bool))


# --- concepts over several SAEs -----------------------------------------------


@pytest.fixture
def marked():
    x, sae, there, kind = absorbing()
    generator = np.random.default_rng(0)
    token = generator.integers(20, 200, len(x))
    token[there] = generator.integers(0, 5, there.sum())
    token[kind] = 5
    choose = np.arange(len(x)) % 2 == 0
    return x, sae, concept_splits.with_nulls({"c": there}, token, choose), token, kind


def test_told_and_absorbed_agree_with_the_plan(marked):
    x, sae, concepts, token, kind = marked
    told = concept_splits.told({"a": sae}, concepts)
    own = told.set_index("name")
    assert own.latent["c"] == 0 and set(own.own["c"]) == {0, 1}
    assert own.recall["c"] == own.precision["c"] == 1
    assert own.F1["null: c"] < 0.2 < own.F1["c"]
    words = np.array([f"w{t}" for t in token])
    one = told.assign(own=[(0,), (0,)])  # as if a single latent were allowed
    found = concept_splits.absorbed({"a": sae}, x, concepts, one, words, above=0.2)
    row = found.table.set_index("name").loc["c"]
    there = concepts.half(False)["c"]
    planted = 100 * kind[~concepts.choose][there].mean()
    assert row.absorbed == pytest.approx(planted, abs=1)
    assert row.silent == pytest.approx(planted, abs=1)
    assert row.shuffled < row.absorbed
    assert found.by.on.tolist() == ["w5"] and found.by.latent.tolist() == [1]
    wide = concept_splits.by_sae(told, "F1", null="F1")
    assert wide.columns.tolist() == ["name", "a", "null"]
    assert wide["null"].tolist() == [own.F1["null: c"]]
    assert concept_splits.means(told, "F1") == {"a": pytest.approx(own.F1["c"])}
    null = concept_splits.means(told, "F1", null=True)
    assert null == {"a": pytest.approx(own.F1["null: c"])}
    same = concept_splits.by_sae(found.table, "absorbed", null="shuffled")
    assert same["null"].tolist() == [row.shuffled]


def test_a_concept_missing_from_a_half_is_refused(marked):
    _, _, concepts, token, _ = marked
    only = {"c": concepts.truth["c"] & concepts.choose}
    with pytest.raises(ValueError, match="judge on"):
        concept_splits.with_nulls(only, token, concepts.choose)
