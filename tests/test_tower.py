"""Towers of SAEs on codes: scored down to activations, and not fooled by a loss."""

import math

import jaxtyping
import pytest
import torch
from torch.nn import functional as F

from saeutils import tower
from saeutils.baselines import Dictionary
from saeutils.datasets import ImageData
from saeutils.training import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:step .*collapsed", "ignore:.*not fired")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rows(n=2000, d=16):
    """Sparse sums of 24 directions."""
    z = (normal(n, 24) - 1).relu()
    return 10 * z @ F.normalize(normal(24, d, seed=1), dim=1)


QUICK = TrainConfig(
    "l1", l1_coefficient=1, batch_size=128, steps=200, lr=4e-3, revival=()
)


def test_a_tower_comes_down_as_it_went_up():
    W = [F.normalize(normal(a, b, seed=a), dim=1) for a, b in ((6, 4), (9, 6))]
    b = [normal(4), normal(6)]
    saes = [Dictionary(w, v, signed=False) for w, v in zip(W, b, strict=True)]
    both = tower.Tower(saes)
    x = normal(5, 4)
    z = saes[1].encode(saes[0].encode(x))
    assert torch.equal(both.encode(x), z)
    assert torch.equal(both.decode(z), saes[0].decode(saes[1].decode(z)))
    assert torch.allclose(both.W_dec, W[1] @ W[0])
    # W_dec is what a latent of the top moves
    step = both.decode(z + torch.eye(9)[3]) - both.decode(z)
    assert torch.allclose(step, both.W_dec[3].expand(5, 4), atol=1e-5)


def test_both_normalisations_are_one_loss_up_to_the_coefficient():
    x, lam = rows(), 0.05
    config = TrainConfig("l1", l1_coefficient=1, batch_size=128, steps=40, revival=())
    factor = 16 * 128
    a = tower.stack(x, [32], l1_coefficient=lam, config=config)
    b = tower.stack(
        x,
        [32],
        l1_coefficient=lam / factor,
        normalisation="summed",
        config=config,
    )
    assert torch.allclose(a[0].tower.W_dec, b[0].tower.W_dec, atol=1e-6)


def test_the_summed_loss_collapses_and_the_alarm_says_so():
    x = rows()
    good = tower.stack(x, [32, 32, 32], l1_coefficient=0.3, config=QUICK)
    assert len(good) == 3 and not any(level.alarm for level in good)
    assert all(level.whole.fvu < 0.5 for level in good)
    bad = tower.stack(
        x,
        [32, 32, 32, 32],
        l1_coefficient=2e-3,
        normalisation="summed",
        input_scale="none",
        config=QUICK,
    )
    assert "collapsed" in bad[-1].alarm and bad[-1].whole.fvu > 0.9
    assert bad[-1].loss < bad[0].loss  # which looks like progress
    table = tower.tower_table(bad)
    assert table["name"].iloc[0] == "level 1" and table["alarm"].iloc[-1]


def test_a_tower_ends_where_no_latent_fires():
    x = rows(500)
    dead = tower.stack(x, [8, 8, 8], l1_coefficient=1e4, config=QUICK)
    assert dead[-1].own.l0 == 0 and len(dead) < 3


def test_levels_are_scored_in_the_model():
    images = ImageData(
        (normal(60, 4, 4).abs() * 90).clamp(max=255).to(torch.uint8),
        torch.arange(60) % 3,
        torch.arange(60),
        "test",
        "noise",
    )
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 12), torch.nn.ReLU(), torch.nn.Linear(12, 3)
    )
    with torch.no_grad():
        x = model[1](model[0](images.pixels))
    levels = tower.stack(
        x,
        [16, 16],
        l1_coefficient=0.1,
        config=QUICK,
        model=model,
        hook="1",
        data=images,
    )
    table = tower.tower_table(levels, "storey")
    assert table["Δ accuracy (points)"].notna().all()
    # what it says of activations is what decoding all the way down gives
    both = levels[1].tower
    error = (x - both.decode(both.encode(x))).square().sum()
    fvu = (error / (x - x.mean(0)).square().sum()).item()
    assert table["FVU of activations"].iloc[1] == pytest.approx(fvu, rel=1e-4)


def test_compare_holds_three_towers_side_by_side():
    x = rows(500)
    table = tower.compare(x, [24, 24], l1_coefficient=1.0, config=QUICK)
    assert table.groupby("loss", sort=False).size().tolist() == [2, 2, 2]
    first = table[table["name"] == "level 1"].set_index("loss")["FVU of its data"]
    assert first["summed, raw"] == pytest.approx(first["per row, raw"], abs=1e-4)
    last = table[table["name"] == "level 2"].set_index("loss")["FVU of its data"]
    assert last["summed, raw"] > last["per row, raw"]


def test_angles_of_known_and_of_random_directions():
    assert tower.angles(torch.eye(5)) == pytest.approx((90, 0), abs=1e-6)
    plane = torch.tensor([[1.0, 0], [0, 2], [3, 3]])  # 90, 45, 45 degrees
    want = 60, math.sqrt((30**2 + 2 * 15**2) / 3)
    assert tower.angles(plane) == pytest.approx(want)
    d = 400
    mean, sd = tower.angles(normal(1100, d))  # more than one block of rows
    assert mean == pytest.approx(90, abs=0.02)
    assert sd == pytest.approx(tower.random_angle_sd(d), rel=0.02)
    assert tower.random_angle_sd(2304) == pytest.approx(1.19, abs=0.005)


def test_bad_arguments_are_refused(unchecked):
    x = rows(100)
    with pytest.raises(ValueError, match=r"per row.*summed.*'mean'"):
        tower.stack(x, [8], l1_coefficient=1.0, normalisation="mean")
    with pytest.raises(ValueError, match="fewer rows"):
        tower.stack(x, [1024], l1_coefficient=1.0, budget=1000)
    with pytest.raises(ValueError, match="one level or more"):
        tower.stack(x, [], l1_coefficient=1.0)
