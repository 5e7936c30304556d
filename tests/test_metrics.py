"""The scorecard: known answers, independence of batching, bad input."""

import math
from types import SimpleNamespace

import jaxtyping
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from saeutils import baselines, metrics, models, splicing
from saeutils.baselines import Dictionary
from saeutils.store import TensorStore
from saeutils.streaming import RunningMoments, firings


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def identity(d):
    """Latent i reads and writes dimension i, and fires where it is positive."""
    return Dictionary(torch.eye(d), torch.zeros(d), signed=False)


def card(sae, rows, **options):
    return metrics.scorecard(sae, rows, eval_set="test rows", **options)


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- known answers ------------------------------------------------------------


def test_hand_set_identity_sae():
    rows = torch.tensor([[1.0, 0, 0], [3, 2, 0], [0, 0, 0], [0, 4, 0]])
    got = card(identity(3), rows, name="identity")
    assert (got.fvu, got.mse, got.alarm) == (0, 0, "")
    assert got.l0 == 4 / 4
    assert got.l1 == (1 + 5 + 0 + 4) / 4
    assert got.firing_counts.tolist() == [2, 2, 0]
    assert (got.n_rows, got.d_in, got.d_sae) == (4, 3, 3)
    assert (got.dead, got.rare) == (1 / 3, 0)
    assert got.dense == got.very_dense == 2 / 3
    assert got.row()["eval set"] == "test rows" and got.row()["rows"] == 4


def test_fvu_and_mse_against_numbers_worked_out_by_hand():
    rows = torch.tensor([[1.0, 10], [3, 14]])
    half = Dictionary(torch.eye(2), torch.zeros(2), scale=0.5)
    got = card(half, rows)
    # Errors are x/2: (1 + 9 + 100 + 196)/4. Centred rows: ±1 and ±2.
    assert got.fvu == pytest.approx((306 / 4) / 10)
    assert got.mse == pytest.approx((306 / 4) / 4)
    assert "no better than the mean" in got.alarm


@given(st.integers(2, 60), st.integers(1, 7), st.floats(-1e3, 1e3), st.integers(0, 999))
def test_the_mean_predictor_explains_exactly_nothing(n, d, offset, seed):
    rows = normal(n, d, seed=seed) + offset
    got = card(baselines.mean_predictor(rows), rows)
    assert got.fvu == pytest.approx(1, abs=1e-6)
    assert (got.l0, got.l1) == (0, 0)


def test_fvu_of_the_mean_predictor_survives_cancellation():
    """Mean 1e4, sd 1: Σx² − nμ² in float32 would have no correct digit left."""
    rows = normal(5000, 3) + 1e4
    assert card(baselines.mean_predictor(rows), rows).fvu == pytest.approx(1, abs=1e-6)


def test_fvu_uses_the_mean_of_each_dimension():
    """Means spread far apart: one overall mean would call this 0 error."""
    rows = normal(500, 4) + torch.tensor([-100.0, 0, 50, 200])
    overall = Dictionary(torch.zeros(0, 4), rows.mean().expand(4))
    assert card(overall, rows).fvu > 1000


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 999))
def test_no_number_depends_on_the_chunk_size(n, size, seed):
    """Whole numbers, so that the SAE itself is exact in float32."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.randint(-4, 9, (n, 5), generator=g).float()
    sae = Dictionary(torch.eye(5), torch.full((5,), 2.0), k=2, signed=False)
    whole, parts = card(sae, rows), card(sae, rows, budget=4 * 10 * size)
    for key, value in whole.row().items():
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-12, nan_ok=True)
        assert parts.row()[key] == value, key
    assert torch.equal(whole.firing_counts, parts.firing_counts)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 99))
def test_running_moments_equal_the_obvious_ones(n, size, seed):
    x = normal(n, 3, seed=seed) * torch.tensor([1.0, 1e-3, 50]) + 1e3
    full, diagonal = RunningMoments(3, covariance=True), RunningMoments(3)
    for part in x.split(size):
        full.update(part)
        diagonal.update(part)
    centred = x.double() - x.double().mean(0)
    torch.testing.assert_close(full.mean, x.double().mean(0))
    torch.testing.assert_close(full.scatter, centred.T @ centred)
    torch.testing.assert_close(diagonal.scatter, (centred**2).sum(0))


def test_firings_are_the_entries_that_are_not_zero():
    z = torch.tensor([[0.0, 2, -1], [0, 0, 0], [3, 0, 0]])
    row, latent, value = firings(z)
    assert row.tolist() == [0, 0, 2]
    assert latent.tolist() == [1, 2, 0]
    assert value.tolist() == [2, -1, 3]


def test_l1_does_not_depend_on_how_a_code_shares_its_size_with_the_decoder():
    rows = normal(50, 4)
    plain = identity(4)
    scaled = SimpleNamespace(
        W_dec=plain.W_dec / 10,
        encode=lambda x: plain.encode(x) * 10,
        decode=lambda z: plain.decode(z / 10),
    )
    a, b = card(plain, rows), card(scaled, rows)
    assert a.l1 == pytest.approx(b.l1, rel=1e-6)


# --- firing rates -------------------------------------------------------------


def test_rates_fall_into_the_right_classes_and_bars():
    n = 10_000
    rows = torch.zeros(n, 5)
    for latent, firing in enumerate((0, 5, 50, 500, 5000)):
        rows[:firing, latent] = 1
    got = card(identity(5), rows)
    assert (got.dead, got.rare, got.dense, got.very_dense) == (0.2, 0.2, 0.4, 0.2)
    density = got.density
    assert (density.dead, density.n_rows, density.counts.sum()) == (1, n, 4)
    assert density.edges[0] == -4 and density.edges[-1] == 0
    for rate in (5e-4, 5e-3, 5e-2, 5e-1):
        bar = [
            c
            for c, low, high in zip(
                density.counts, density.edges, density.edges[1:], strict=False
            )
            if low <= math.log10(rate) < high
        ]
        assert bar == [1]


def test_a_latent_that_always_fires_and_one_that_fires_once_are_both_drawn():
    for n in (1, 2, 7, 1000):
        rows = torch.zeros(n, 2)
        rows[:, 0] = 1
        rows[0, 1] = 1
        density = card(identity(2), rows).density
        assert density.counts.sum() == 2 and density.dead == 0


# --- collapse -----------------------------------------------------------------


def test_alarms():
    rows = normal(200, 6)
    constant = SimpleNamespace(
        W_dec=torch.eye(6),
        encode=lambda x: torch.full_like(x, 0.1),
        decode=lambda z: z,
    )
    silent = Dictionary(torch.eye(6), torch.full((6,), 1e3), signed=False)
    broken = SimpleNamespace(
        W_dec=torch.eye(6), encode=lambda x: x, decode=lambda z: z * math.nan
    )
    assert "the same for every row" in card(constant, rows).alarm
    assert "almost no latent fires" in card(silent, rows).alarm
    assert "not finite" in card(broken, rows).alarm
    assert card(identity(6), rows.abs()).alarm == ""


# --- decoder directions -------------------------------------------------------


def test_init_cosine_is_the_median_of_absolute_cosines():
    start = torch.eye(3)
    now = torch.tensor([[-2.0, 0, 0], [0, 3, 4], [5, 0, 0]])
    sae = Dictionary(now, torch.zeros(3))
    assert card(sae, torch.eye(3), init=start).init_cosine == pytest.approx(0.6)
    assert math.isnan(card(sae, torch.eye(3)).init_cosine)


def test_mmcs_known_answers():
    a = torch.tensor([[1.0, 0], [0, 2]])
    b = torch.tensor([[3.0, 4], [-1, 0]])
    assert metrics.max_cosine(a, b).tolist() == pytest.approx([0.6, 0.8])
    assert metrics.mmcs(a, b) == pytest.approx(0.7)
    assert metrics.mmcs(b, a) == pytest.approx((0.8 + 0) / 2)
    assert metrics.mmcs(a, a * 7) == pytest.approx(1)
    assert metrics.agreement([a, b]) == pytest.approx((0.7 + 0.4) / 2)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 200), st.integers(0, 99))
def test_mmcs_in_blocks_equals_the_dense_matrix(n, m, budget, seed):
    a, b = normal(n, 4, seed=seed), normal(m, 4, seed=seed + 1)
    dense = nn.functional.cosine_similarity(a[:, None], b[None], dim=2).amax(1)
    torch.testing.assert_close(metrics.max_cosine(a, b, budget=budget), dense)


def test_a_zero_row_matches_nothing_and_is_not_counted():
    a = torch.tensor([[1.0, 0], [0, 0]])
    assert metrics.mmcs(a, a) == pytest.approx(1)
    assert metrics.max_cosine(a, a)[1].isnan()


# --- in the model -------------------------------------------------------------


def mlp_and_data(n=300):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, 6, generator=g)
    model = models.MLP((8, 5), d_in=6, n_classes=3, seed=1)
    return model, (x, model(x).argmax(1))


def test_splicing_the_identity_changes_nothing_at_all():
    model, data = mlp_and_data()
    for hook in ("fc1", "fc1.linear", "fc2", "head"):
        got = metrics.in_model(model, hook, lambda x: x, data, batch_size=7)
        assert got.delta_accuracy == 0 and got.delta_cross_entropy == 0
        assert got.clean.accuracy == 1
        for against in ("mean", "zero"):
            assert got.recovered(against).share == 1
            assert got.recovered(against).denominator > 0


def test_splicing_the_mean_recovers_nothing_and_zero_likewise():
    model, data = mlp_and_data()
    mean = model.fc1(data[0]).mean(0)
    got = metrics.in_model(model, "fc1", lambda x: mean.expand_as(x), data)
    assert got.recovered("mean").share == pytest.approx(0, abs=1e-4)
    got = metrics.in_model(model, "fc1", torch.zeros_like, data)
    assert got.recovered("zero").share == 0
    assert got.recovered("zero", "accuracy").share == 0
    assert got.zero_ablated == got.spliced


def test_in_model_equals_a_model_rewired_by_hand():
    model, data = mlp_and_data()
    got = metrics.in_model(model, "fc1", lambda x: 0.3 * x, data, batch_size=11)
    rewired = nn.Sequential(model.fc1, model.fc2, model.head)
    with torch.no_grad():
        model.fc2.linear.weight *= 0.3
    want = models.evaluate(rewired, data)
    assert got.spliced.accuracy == want.accuracy
    assert got.spliced.cross_entropy == pytest.approx(want.cross_entropy, rel=1e-5)


def test_a_layer_that_hardly_matters_recovers_nothing_meaningful():
    model, data = mlp_and_data()
    with torch.no_grad():
        model.fc2.linear.weight *= 1e-4
    got = metrics.in_model(model, "fc1", torch.zeros_like, data).recovered("zero")
    assert math.isnan(got.share) and abs(got.denominator) < 0.01


def test_a_wrong_hook_is_an_error_never_a_recovery():
    model, data = mlp_and_data()
    with pytest.raises(ValueError, match=r"no hook point 'fc9'.*fc1, fc1.linear"):
        metrics.in_model(model, "fc9", lambda x: x, data)
    model.spare = nn.Identity()
    model.forward = lambda x: model.head(model.fc2(model.fc1(x)))
    with pytest.raises(ValueError, match="never calls 'spare'"):
        metrics.in_model(model, "spare", lambda x: x, data)
    with pytest.raises(ValueError, match=r"\(300, 8\), but the reconstruction"):
        metrics.in_model(model, "fc1", lambda x: x[:, :5], data)
    assert not model.fc1._forward_hooks


def test_in_model_takes_positions_and_tuples():
    class Attention(nn.Module):
        def forward(self, x):
            return x * 2, "weights"

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = Attention(), nn.Linear(4, 3)

        def forward(self, x):
            return self.out(self.attention(x)[0].mean(1))

    seen = []

    def reconstruct(rows):
        seen.append(tuple(rows.shape))
        return rows

    x, y = normal(10, 7, 4), torch.zeros(10, dtype=torch.int64)
    got = metrics.in_model(Model(), "attention", reconstruct, (x, y))
    assert seen == [(70, 4)] and got.delta_cross_entropy == 0


def test_scorecard_splices_the_sae_in():
    model, data = mlp_and_data()
    acts = model.fc1(data[0]).detach()
    got = card(
        identity(8), acts, model=model, hook="fc1", data=data, budget=4 * 16 * 10
    )
    assert got.in_model.delta_accuracy == 0
    # A store knows its hook point.
    store = TensorStore(acts, hook="fc1")
    assert card(identity(8), store, model=model, data=data).in_model == got.in_model
    row = got.row()
    assert row["accuracy %"] == 100 and row["CE recovered, mean-abl."] == 1
    assert row["of nats (mean)"] == got.in_model.recovered("mean").denominator


def model_card():
    model, data = mlp_and_data()
    acts = TensorStore(model.fc1(data[0]), hook="fc1")
    return card(identity(8), acts, model=model, data=data)


# --- tables -------------------------------------------------------------------


def test_tables():
    rows = normal(30, 4).abs()
    cards = [
        card(identity(4), rows, name="identity"),
        card(identity(4), rows * 2, name="identity"),
        card(baselines.mean_predictor(rows), rows, name="mean"),
    ]
    frame = metrics.table(cards)
    assert list(frame["name"]) == ["identity", "identity", "mean"]
    assert "init-cosine" not in frame and "alarm" not in frame
    short = metrics.summary(frame)
    assert list(short["name"]) == ["identity", "mean"]
    assert list(short["runs"]) == [2, 1]
    assert "±" in short["L1"][0] and short["FVU"][0] == "0"
    assert short["FVU"][1] == "1.00" and short["dead %"][1] == "–"
    assert short["eval set"][0] == "test rows"
    assert set(metrics.KEY_COLUMNS) <= set(model_card().row())


@pytest.mark.parametrize(
    "values, text",
    [
        ([1.0, 3.0], "2 ± 1"),
        ([60000, 60000], "60,000"),
        ([60000, 10000], "35,000 ± 35,355"),
        ([0.0404, 0.04045], "0.0404"),  # the spread is below the last figure
        ([0.041, 0.045, 0.049], "0.045 ± 0.004"),
        ([15.9, 16.5], "16.2 ± 0.4"),
        ([-0.31, -0.52], "-0.4 ± 0.1"),
        ([0.0, 0.0], "0"),
        ([0.5], "0.500"),
        ([math.nan, 2.0], "2.00"),
        ([math.nan], "–"),
    ],
)
def test_summary_shows_the_figures_that_the_spread_leaves_meaning(values, text):
    frame = pd.DataFrame({"name": ["a"] * len(values), "x": values})
    assert metrics.summary(frame)["x"][0] == text


# --- bad input ----------------------------------------------------------------


def test_bad_rows_are_refused():
    sae = identity(3)
    with pytest.raises(ValueError, match=r"d_in = 4, but .* takes d_in = 3"):
        card(sae, normal(5, 4))
    rows = normal(9, 3)
    rows[7, 1] = math.inf
    with pytest.raises(ValueError, match="row 7 contains NaN or Inf"):
        card(sae, rows, budget=4 * 6 * 2)
    with pytest.raises(ValueError):
        card(sae, rows[:0])


def test_half_given_arguments_are_refused(unchecked):
    sae, rows = identity(3), normal(5, 3)
    model, data = models.MLP((3,), d_in=6), (normal(2, 6), torch.zeros(2).long())
    with pytest.raises(ValueError, match="got hook None, a model, data"):
        card(sae, rows, model=model, data=data)
    with pytest.raises(ValueError, match="got hook 'fc1', a model, no data"):
        card(sae, rows, hook="fc1", model=model)
    with pytest.raises(ValueError, match="two dictionaries or more"):
        metrics.agreement([normal(2, 3)])
    with pytest.raises(ValueError, match=r"init has shape \(2, 3\)"):
        card(sae, rows, init=torch.eye(3)[:2])
    with pytest.raises(ValueError, match="4 and 3 dimensions"):
        metrics.mmcs(normal(2, 4), normal(2, 3))
    with pytest.raises(ValueError, match="0 and 2 rows"):
        metrics.mmcs(normal(2, 3)[:0], normal(2, 3))
    clean = models.Evaluation(1.0, 0.1)
    with pytest.raises(ValueError, match='"mean" or "zero"'):
        splicing.InModel("fc1", clean, clean, clean, clean).recovered("median")
