"""Meta-SAEs find planted parts and nothing in noise; towers fall when they must."""

import math

import jaxtyping
import pytest
import torch
from torch.nn import functional as F

from saeutils import meta
from saeutils.baselines import Dictionary
from saeutils.examples import Codes, top_examples
from saeutils.metrics import max_cosine
from saeutils.sae import initial_params


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def planted(n=600, parts=24, d=32, k=2, seed=0):
    """Rows that are sums of k of `parts` directions: a meta-SAE must find these."""
    generator = torch.Generator().manual_seed(seed)
    truth = F.normalize(normal(parts, d, seed=seed + 1), dim=1)
    chosen = torch.rand(n, parts, generator=generator).topk(k, dim=1).indices
    z = torch.zeros(n, parts).scatter_(1, chosen, 1.0)
    return z @ truth, truth


class Linear:
    """An SAE by hand, with the names of a sae_lens one."""

    def __init__(self, d, b_enc=0.0):
        self.W_enc = self.W_dec = torch.eye(d)
        self.b_enc, self.b_dec = torch.full((d,), b_enc), torch.zeros(d)

    def encode(self, x):
        return (x @ self.W_enc + self.b_enc).relu()


# --- the meta-SAE -------------------------------------------------------------


def test_planted_parts_are_found_on_rows_never_seen():
    rows, truth = planted()
    real = meta.train_meta(rows, 32, k=2, lr=4e-3)
    null = meta.train_meta(meta.gaussian_rows(rows), 32, k=2, lr=4e-3)
    assert real.explained > 0.8 > null.explained + 0.3
    found, chance = (max_cosine(truth, w) for w in (real.sae.W_dec, normal(32, 32)))
    assert found.median() > 0.75 > chance.median() + 0.25
    assert (real.codes(rows) > 0).sum() <= 2 * len(rows)


def test_the_rows_kept_out_are_not_trained_on():
    """With another direction in each row kept out, nothing else changes."""
    rows = F.normalize(normal(100, 8), dim=1)
    first = meta.train_meta(rows, 12, k=2, steps=20)
    train, held_out = first.rows
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(100))
    assert len(held_out) == 20
    changed = rows.clone()
    changed[held_out] = F.normalize(normal(20, 8, seed=5), dim=1)
    again = meta.train_meta(changed, 12, k=2, steps=20)
    assert torch.equal(first.sae.W_dec, again.sae.W_dec)
    assert first.explained_in_sample == again.explained_in_sample
    assert first.explained != again.explained


def test_only_directions_count():
    rows = normal(80, 8)
    lengths = 1 + torch.arange(80.0)[:, None]
    a, b = (meta.train_meta(r, 12, k=2, steps=10) for r in (rows, lengths * rows))
    assert a.explained == pytest.approx(b.explained, abs=1e-4)


def test_in_sample_flatters_where_there_is_nothing_to_find():
    noise = meta.isotropic_rows(normal(200, 32))
    fit = meta.train_meta(noise, 64, k=4, steps=300)
    assert fit.explained_in_sample > fit.explained + 0.2


def test_explained_is_zero_for_the_mean_and_one_for_a_copy():
    x = normal(50, 6).abs()
    copy = Linear(6)
    assert meta.explained(copy, x, 6) == pytest.approx(1)
    says_mean = Linear(6, b_enc=-100.0)
    says_mean.b_dec = x.mean(0)
    assert meta.explained(says_mean, x, 2) == pytest.approx(0, abs=1e-6)


def test_codes_keep_exactly_the_largest():
    x = torch.tensor([[3.0, 1, -9], [2, 5, 4]])
    assert meta.codes_at(Linear(3), x, 1.5).tolist() == [[3, 0, 0], [0, 5, 4]]
    every = meta.codes_at(Linear(3), x, 3)
    assert torch.equal(every, x.relu())


def test_gaussian_rows_have_the_covariance_and_isotropic_ones_do_not():
    falls = 1 / (1 + torch.arange(40.0)) ** 0.3
    rows = F.normalize(normal(9000, 40) * falls + 0.2, dim=1)
    drawn = meta.gaussian_rows(rows)
    assert torch.allclose(drawn.norm(dim=1), torch.ones(9000))
    # lengths are set to 1 after the draw, which moves the moments a little
    assert torch.allclose(drawn.mean(0), rows.mean(0), atol=0.01)
    even = meta.isotropic_rows(rows)
    want, got, flat = (x.T.cov() for x in (rows, drawn, even))
    assert (got - want).norm() < 0.1 * want.norm()
    assert (flat - want).norm() > 0.3 * want.norm()
    assert torch.allclose(flat, torch.eye(40) / 40, atol=0.002)
    assert not torch.equal(drawn, meta.gaussian_rows(rows, seed=1))


def test_the_same_seed_everywhere_gives_nothing_away():
    """The start of a base SAE, of its meta-SAE, and the nulls are unrelated."""
    base = initial_params("batchtopk", 60, torch.zeros(64), seed=0)["W_dec"]
    start = meta.train_meta(base, 40, k=1, steps=1, lr=1e-9, seed=0).sae.W_dec
    drawn = [meta.isotropic_rows(base, 0), meta.gaussian_rows(base, 0), start]
    for rows in drawn:
        assert F.cosine_similarity(base[:40], rows[:40]).abs().max() < 0.6


def test_a_refitted_encoder_leaves_its_dictionary_alone():
    rows, truth = planted()
    dictionary = torch.cat([truth, normal(8, 32)])
    fit = meta.refit_encoder(rows, dictionary, k=2, lr=4e-3)
    assert torch.allclose(fit.sae.W_dec, F.normalize(dictionary, dim=1), atol=1e-6)
    assert fit.explained > 0.8
    untrained = meta.refit_encoder(rows, dictionary, k=2, steps=1)
    assert fit.explained > untrained.explained + 0.01


def test_compare_holds_each_fit_against_the_null_of_its_own_base():
    decoders = {s: planted(seed=10 * s)[0] for s in (0, 1)}
    small = {"half": [planted(seed=10 * s)[1] for s in (0, 1)]}
    frame = meta.compare(decoders, {"half": 16}, smaller=small, k=2, steps=100)
    assert len(frame) == 8 and list(frame["base"].unique()) == [0, 1]
    for _, part in frame.groupby("base"):
        by_name = part.set_index("name")
        null = by_name.explained["Gaussian rows"]
        assert by_name.excess["Gaussian rows"] == 0
        difference = by_name.explained["decoder rows"] - null
        assert by_name.excess["decoder rows"] == difference > 0


def test_through_latents_joins_codes_and_members():
    rows = torch.eye(4)
    fit = meta.train_meta(torch.cat([rows, -rows, normal(30, 4)]), 6, k=1, steps=5)
    base = Dictionary(rows, torch.zeros(4), signed=False)
    live = torch.tensor([True, False, True, True])
    through = meta.ThroughLatents(base, fit, live)
    assert (through.members[1] == 0).all()
    assert torch.equal(through.members[live], fit.codes(rows[live]))
    x = torch.tensor([[0.5, 9, 0, 2]])
    want = 0.5 * through.members[0] + 2 * through.members[3]
    assert torch.allclose(through.encode(x)[0], want)


def test_purity_by_hand():
    members = torch.tensor([[1.0, 0, 0], [3, 1, 0], [0, 1, 0], [9, 9, 9]])
    classes = torch.tensor([5, 5, 2, -1])
    assert meta.purity(members, classes) == pytest.approx((1 + 0.5) / 2)


def test_overlap_is_of_ids():
    ids = torch.arange(10, 14)
    a, b = (
        top_examples(Codes(None, torch.tensor(z), ids=ids), 2)
        for z in (
            [[1.0, 0, 0], [2, 0, 3], [3, 0, 0], [0, 0, 0]],
            [[9.0, 0, 0], [0, 0, 1], [8, 0, 0], [0, 0, 0]],
        )
    )
    same, neither, equal = meta.overlap(a, b).tolist()
    assert same == pytest.approx(1 / 3)  # {11, 12} and {10, 12}
    assert math.isnan(neither) and equal == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.cat([torch.zeros(1, 4), torch.ones(9, 4)]), "row 0 has length 0"),
        (torch.full((9, 4), math.nan), "row 0 has length nan"),
        (torch.ones(3, 4), "two rows or more"),
    ],
)
def test_bad_rows_are_refused(unchecked, rows, message):
    with pytest.raises(ValueError, match=message):
        meta.train_meta(rows, 4, k=1, steps=1)
