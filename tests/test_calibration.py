"""Scores between models, calibrated: what is read, and what it is put between."""

import math

import pytest
import torch

from saeutils import plots
from saeutils.calibration import NAMES, between, read_pair
from saeutils.pair_scores import PairScores
from saeutils.related import related
from saeutils.synthetic import Synthetic, SyntheticConfig


class Oracle:
    """Codes that are the truth, with latents in another order."""

    def __init__(self, truth, seed):
        order = torch.randperm(truth.n, generator=torch.Generator().manual_seed(seed))
        self.W_dec, self.b = truth.W[order], truth.b

    def encode(self, x):
        return torch.linalg.lstsq(self.W_dec.T, (x - self.b).T).solution.T

    def decode(self, z):
        return z @ self.W_dec + self.b


@pytest.fixture(scope="module")
def frame():
    """With n < d codes of a least-squares oracle are exact."""
    truth = Synthetic(
        SyntheticConfig(n=24, d=32, l0=3, frequency="uniform", largest=0.5)
    )
    pair = related(truth, shared=0.5)
    saes = Oracle(pair.a, 0), Oracle(pair.b, 1)
    return read_pair(pair, *saes, rows=3000, nulls=2)


def test_an_oracles_codes_score_as_the_truth_does(frame):
    read = frame[~frame["null"]].set_index("codes")
    assert list(read.index) == ["true features", "SAE latents"]
    assert (read["found"] == 1).all()
    true, sae = read.loc["true features"], read.loc["SAE latents"]
    for s in NAMES:
        assert sae[s] == pytest.approx(true[s], abs=0.01, nan_ok=True), s
    assert math.isnan(sae["svcca_matched"])  # 24 pairs in 32 dimensions: refused
    assert read["hungarian"].tolist() == pytest.approx([0.5, 0.5], abs=0.06)


def test_each_is_beside_its_null(frame):
    nulls = frame[frame["null"]]
    assert nulls.groupby("codes").size().tolist() == [2, 2]
    assert nulls["hungarian"].max() < 0.1 < frame["hungarian"].max()


def test_between_is_0_at_the_null_and_1_at_the_ceiling(frame):
    low, high = ({s: value for s in NAMES} for value in (0.2, 0.7))
    low["rsa"] = high["rsa"]
    three = frame.iloc[:3].assign(**{s: [0.2, 0.7, 0.45] for s in NAMES})
    put = between(three, low, high)
    assert put["hungarian"].tolist() == pytest.approx([0, 1, 0.5])
    assert all(math.isnan(v) for v in put["rsa"])  # nothing lies between


def test_names_are_of_scores():
    assert set(NAMES) <= set(PairScores._fields)


def test_figures_show_what_was_read(frame):
    read, nulls = frame[~frame["null"]].assign(share=0.5), frame[frame["null"]]
    fig = plots.against_truth(
        read,
        NAMES,
        x="share",
        group="codes",
        nulls=nulls,
        ceilings={"rsa": 0.9, "svcca": math.nan},
        title="t",
        x_name="true share",
    )
    titles = {a.text for a in fig.layout.annotations}
    assert {f"<b>{name}</b>" for name in NAMES.values()} <= titles
    dots = [t for t in fig.data if t.mode == "markers"]
    assert len(dots) == 2 * len(NAMES)
    dashed = [t for t in fig.data if t.line.dash == "dash"]
    assert [list(t.y) for t in dashed] == [[0.9, 0.9]]
    table = read.set_index("codes")[[*NAMES]]
    table.iloc[0, 0] = math.nan
    fig = plots.misreadings({"half": (table, 0.5), "none": (table, 0.0)}, title="t")
    first, second = fig.data
    assert first.z[1][1] == pytest.approx(table.iloc[1, 1] - 0.5)
    assert second.z[1][1] == pytest.approx(table.iloc[1, 1])
    assert first.text[0][0] == "" and first.text[1][1] == f"{table.iloc[1, 1]:.2f}"
