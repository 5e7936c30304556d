"""One scorecard for every SAE and every control, each number with its denominator.

Anything with `encode`, `decode` and `W_dec` can be scored: an SAE, PCA, raw neurons.
Sums over rows are float64, so a number does not depend on how the rows were batched.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from saeutils.datasets import ImageData
from saeutils.splicing import InModel, in_model, in_models
from saeutils.store import as_store
from saeutils.streaming import (
    BUDGET,
    Rows,
    RunningMoments,
    checked_chunks,
    firings,
    rows_within,
)

if TYPE_CHECKING:
    import pandas as pd

KEY_COLUMNS = (
    *("name", "FVU", "L0", "dead %", "rare %", "dense > 10 %", "init-cosine"),
    *("Δ accuracy (points)", "CE recovered, mean-abl.", "of nats (mean)"),
)
TEXT_COLUMNS = (  # of language models
    *("name", "FVU", "L0", "dead %", "rare %", "dense > 10 %", "init-cosine"),
    *("Δ CE (nats)", "KL (nats)", "CE recovered, mean-abl.", "of nats (mean)"),
    *("CE recovered, zero-abl.", "of nats (zero)"),
)
RARE, DENSE, VERY_DENSE = 1e-3, 1e-2, 1e-1  # firing rates
BIN = 0.25  # of a decade, of the density histogram


@runtime_checkable
class Autoencoder(Protocol):
    """What is scored; it also has `W_dec`, a tensor (d_sae, d_in)."""

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...


class Density(NamedTuple):
    """Histogram of log10 firing rates; latents that never fire stand apart."""

    edges: Float64[np.ndarray, " bins+1"]
    """log10 of the share of rows a latent fires on; the last edge is 0 (always)."""
    counts: Int64[np.ndarray, " bins"]
    """Latents in each bin."""
    dead: int
    """Latents that fired on no row, for which log10 has no value."""
    n_rows: int
    """Rows counted over; 1 / n_rows is the smallest rate that can be seen."""


@dataclass(frozen=True, eq=False)
class Scorecard:
    """What one autoencoder does on one named set of rows. Shares are in [0, 1]."""

    name: str
    eval_set: str
    n_rows: int
    d_in: int
    d_sae: int
    fvu: float
    """Σ‖x − x̂‖² / Σ‖x − mean‖² with the mean of each dimension; 1 for that mean."""
    mse: float
    """Mean of (x − x̂)² over rows and dimensions, in squared activation units."""
    l0: float
    """Mean number of latents that fire (code ≠ 0) on a row."""
    l1: float
    """Mean over rows of Σ_i |z_i| ‖W_dec_i‖: activation units, whatever the norms."""
    firing_counts: Int64[Tensor, " d_sae"]
    """Rows on which each latent fires."""
    init_cosine: float
    """Median over latents of |cos(W_dec row, its start)|; NaN when no start is given.
    Near 1: the dictionary has hardly moved, so few dead latents mean nothing."""
    alarm: str
    """What looks collapsed, in words; empty when nothing does."""
    in_model: InModel | None

    @property
    def firing_rates(self) -> Float64[Tensor, " d_sae"]:
        """Share of the rows on which each latent fires."""
        return self.firing_counts.double() / self.n_rows

    @property
    def dead(self) -> float:
        """Share of latents that fire on no row of `eval_set`."""
        return self._share(self.firing_counts == 0)

    @property
    def rare(self) -> float:
        """Share of latents that fire, but on less than 1 row in 1,000."""
        return self._share((self.firing_counts > 0) & (self.firing_rates < RARE))

    @property
    def dense(self) -> float:
        """Share of latents that fire on more than 1 row in 100."""
        return self._share(self.firing_rates > DENSE)

    @property
    def very_dense(self) -> float:
        """Share of latents that fire on more than 1 row in 10."""
        return self._share(self.firing_rates > VERY_DENSE)

    def _share(self, mask: Tensor) -> float:
        return mask.double().mean().item()

    @property
    def density(self) -> Density:
        """Histogram of log10 firing rates with the dead latents in a bar apart."""
        rates = self.firing_rates.numpy()
        decades = math.ceil(math.log10(self.n_rows) / BIN)
        edges = np.linspace(-decades * BIN, 0, max(decades, 1) + 1)
        counts, _ = np.histogram(np.log10(rates[rates > 0]), edges)
        return Density(edges, counts, int((rates == 0).sum()), self.n_rows)

    def row(self) -> dict[str, str | float | int]:
        """This card as a row of a table; percentages and points are out of 100."""
        out: dict[str, str | float | int] = {
            "name": self.name,
            "latents": self.d_sae,
            "FVU": self.fvu,
            "MSE": self.mse,
            "L0": self.l0,
            "L1": self.l1,
            "dead %": 100 * self.dead,
            "rare %": 100 * self.rare,
            "dense > 1 %": 100 * self.dense,
            "dense > 10 %": 100 * self.very_dense,
            "init-cosine": self.init_cosine,
        }
        if (m := self.in_model) is not None:
            mean, zero = m.recovered("mean"), m.recovered("zero")
            out |= {
                "accuracy %": 100 * m.spliced.accuracy,
                "Δ accuracy (points)": 100 * m.delta_accuracy,
                "Δ CE (nats)": m.delta_cross_entropy,
                "KL (nats)": m.kl,
                "CE recovered, mean-abl.": mean.share,
                "of nats (mean)": mean.denominator,
                "CE recovered, zero-abl.": zero.share,
                "of nats (zero)": zero.denominator,
            }
        return out | {
            "alarm": self.alarm,
            "eval set": self.eval_set,
            "rows": self.n_rows,
        }


@torch.no_grad()
def scorecard(
    sae: Autoencoder,
    rows: Rows,
    *,
    eval_set: str,
    name: str | None = None,
    init: Float[Tensor, "d_sae d_in"] | None = None,
    model: nn.Module | None = None,
    hook: str | None = None,
    data: ImageData | tuple[Tensor, Tensor] | None = None,
    where: Bool[Tensor, "n positions"] | None = None,
    budget: int = BUDGET,
) -> Scorecard:
    """Score `sae` in one pass over `rows`.

    Args:
        rows: a store, a path to one, or a tensor (n, d_in).
        eval_set: what the rows are, in words ("MNIST train"); "dead" means nothing
            without it, since 10,000 rows leave far more latents silent than 60,000.
        init: W_dec as it was before training, for `init_cosine`.
        model, data, where: when given, the reconstruction is also spliced into `model`
            on `data`, at `hook`, which defaults to the store's; see `in_model`.
        budget: bytes of the (chunk, d_sae) codes held at a time. `encode` itself may
            need a few times as much, and so do codes that are not sparse.

    Raises:
        ValueError: no rows, rows of another width, NaN, a model without data or hook.
    """
    hook = hook or as_store(rows).hook
    if (model is None) != (data is None) or (model is not None and hook is None):
        raise ValueError(
            "to score in the model, model and data are both needed, and a hook if the "
            f"rows do not know theirs; got hook {hook!r}, "
            f"{'no model' if model is None else 'a model'}, "
            f"{'no data' if data is None else 'data'}"
        )
    W_dec = sae.W_dec.detach()
    d_sae, d_in = W_dec.shape
    if init is not None and init.shape != W_dec.shape:
        raise ValueError(
            f"init has shape {tuple(init.shape)}, but W_dec {tuple(W_dec.shape)}"
        )
    size = rows_within(budget, max(d_sae, 2 * d_in))
    device = W_dec.device
    moments = RunningMoments(d_in, device=device)
    error, energy = torch.zeros(2, dtype=torch.float64, device=device)
    counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
    total, magnitude = torch.zeros(2, d_sae, dtype=torch.float64, device=device)
    for x in checked_chunks(rows, d_in, size, device):
        moments.update(x)
        z = sae.encode(x)
        error += (x.double() - sae.decode(z).double()).square().sum()
        _, latent, value = firings(z)
        value = value.double()
        counts += latent.bincount(minlength=d_sae)
        total += latent.bincount(value, d_sae)
        magnitude += latent.bincount(value.abs(), d_sae)
        energy += value.square().sum()
    n = moments.n
    fvu = _ratio(error.item(), moments.scatter.sum().item())
    l0 = counts.sum().item() / n
    constant = (energy - total.square().sum() / n) <= 1e-9 * energy
    spliced = None
    if model is not None:
        reconstruct = _reconstruction(sae, size)
        spliced = in_model(model, hook, reconstruct, data, where=where)
    return Scorecard(
        name=name or type(sae).__name__,
        eval_set=eval_set,
        n_rows=n,
        d_in=d_in,
        d_sae=d_sae,
        fvu=fvu,
        mse=error.item() / (n * d_in),
        l0=l0,
        l1=(magnitude @ W_dec.double().norm(dim=1)).item() / n,
        firing_counts=counts.cpu(),
        init_cosine=math.nan if init is None else init_cosine(W_dec, init),
        alarm=_alarm(fvu, l0, n > 1 and bool(constant)) if d_sae else "",
        in_model=spliced,
    )


def scorecards(
    saes: Mapping[str, Autoencoder],
    rows: Rows,
    *,
    model: nn.Module,
    data: ImageData | tuple[Tensor, Tensor],
    eval_set: str,
    hook: str | None = None,
    init: Mapping[str, Float[Tensor, "d_sae d_in"]] | None = None,
    where: Bool[Tensor, "n positions"] | None = None,
    budget: int = BUDGET,
) -> list[Scorecard]:
    """`scorecard` of each by name (of `init`, too); the model is ablated only once."""
    store = as_store(rows)
    if not saes or (hook := hook or store.hook) is None:
        raise ValueError(
            f"{len(saes)} autoencoders at hook {hook!r}: name a hook, as the rows do "
            "not, and at least one autoencoder"
        )
    init, common = init or {}, dict(eval_set=eval_set, budget=budget)
    cards = [
        scorecard(sae, store, name=name, init=init.get(name), **common)
        for name, sae in saes.items()
    ]
    widest = max(max(len(sae.W_dec), 2 * store.d_in) for sae in saes.values())
    size = rows_within(budget, widest)
    edits = {name: _reconstruction(sae, size) for name, sae in saes.items()}
    spliced = in_models(model, hook, edits, data, where=where)
    return [replace(card, in_model=spliced[card.name]) for card in cards]


def _ratio(error: float, variation: float) -> float:
    """error / variation; rows that do not vary leave FVU undefined unless exact."""
    if variation > 0:
        return error / variation
    return math.nan if error == 0 else math.inf


def _alarm(fvu: float, l0: float, constant: bool) -> str:
    if not math.isfinite(fvu):
        return "FVU is not finite: NaN in the reconstruction, or rows that never vary"
    if l0 < 0.1:
        return f"collapsed: L0 is {l0:.2g}, almost no latent fires"
    if constant:
        return "collapsed: the code is the same for every row"
    if fvu >= 1:
        return f"FVU is {fvu:.3g}: no better than the mean of the rows"
    return ""


def _reconstruction(sae: Autoencoder, size: int) -> Callable[[Tensor], Tensor]:
    def reconstruct(x: Tensor) -> Tensor:
        rows = x.to(sae.W_dec.device)  # a control may lie elsewhere than the model
        out = [sae.decode(sae.encode(part)) for part in rows.split(size)]
        return torch.cat(out).to(x.device)

    return reconstruct


def init_cosine(
    W_dec: Float[Tensor, "d_sae d_in"], init: Float[Tensor, "d_sae d_in"]
) -> float:
    """Median over latents of |cos(row of W_dec, the same row of init)|."""
    a, b = W_dec.detach().double(), init.detach().to(W_dec.device).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return cosine.abs().nanmedian().item()


@torch.no_grad()
def max_cosine(
    W_a: Float[Tensor, "a d_in"],
    W_b: Float[Tensor, "b d_in"],
    *,
    budget: int = BUDGET,
) -> Float[Tensor, " a"]:
    """For each row of W_a the largest cosine with any row of W_b (NaN for a zero row).

    Blocks of rows of W_a: never more than `budget` bytes of cosines at a time.
    """
    if len(W_a) == 0 or len(W_b) == 0:
        raise ValueError(f"nothing to compare: {len(W_a)} and {len(W_b)} rows")
    if W_a.shape[1] != W_b.shape[1]:
        raise ValueError(
            f"the rows live in {W_a.shape[1]} and {W_b.shape[1]} dimensions: cosines "
            "need both SAEs on the same activations"
        )
    a, b = (w.detach() / w.detach().norm(dim=1, keepdim=True) for w in (W_a, W_b))
    b = b[b.isfinite().all(1)].T
    best = [(block @ b).amax(1) for block in a.split(rows_within(budget, b.shape[1]))]
    return torch.cat(best)


def mmcs(W_a: Float[Tensor, "a d_in"], W_b: Float[Tensor, "b d_in"]) -> float:
    """Mean max cosine similarity, a → b: mean over W_a of the best match in W_b.

    Not symmetric when the widths differ: report both directions, and beside them the
    same number for random rows of these shapes, which is far from zero.
    Source: Sharkey, Braun and Millidge (2022).
    """
    return max_cosine(W_a, W_b).double().nanmean().item()


def agreement(dictionaries: Sequence[Float[Tensor, "_ d_in"]]) -> float:
    """Mean of `mmcs` over all ordered pairs, e.g. of the decoders of several seeds."""
    pairs = list(permutations(dictionaries, 2))
    if not pairs:
        raise ValueError("agreement needs two dictionaries or more")
    return sum(mmcs(a, b) for a, b in pairs) / len(pairs)


def table(cards: Iterable[Scorecard]) -> "pd.DataFrame":
    """One row a card, numbers as numbers; a column without any entry is left out."""
    import pandas as pd

    frame = pd.DataFrame([card.row() for card in cards])
    if not frame["alarm"].any():
        frame = frame.drop(columns="alarm")
    return frame.dropna(axis=1, how="all")


def summary(frame: "pd.DataFrame", digits: int = 3) -> "pd.DataFrame":
    """`table` with rows of one name merged: mean ± sd over them, as text to show.

    Text columns keep what the rows agree on. Order: as the names first appear.
    """
    import pandas as pd

    def cell(column: "pd.Series") -> str:
        if not pd.api.types.is_numeric_dtype(column):
            return "; ".join(dict.fromkeys(column.dropna().astype(str)))
        values = column.dropna()
        if values.empty:
            return "–"
        mean, sd = values.mean(), values.std()
        # As many decimals as `digits` figures of the mean need, or one of the spread.
        decimals = digits - 1 - _magnitude(mean)
        if pd.api.types.is_integer_dtype(column) or mean == 0:
            decimals = 0
        if sd > 0:
            decimals = min(decimals, max(-_magnitude(sd), 0))
        decimals = max(decimals, 0)
        spread = f"{sd:,.{decimals}f}" if sd > 0 else "0"
        text = f"{mean:,.{decimals}f}"
        return f"{text} ± {spread}" if float(spread.replace(",", "")) else text

    groups = frame.groupby("name", sort=False)
    out = groups.agg(cell)
    out.insert(0, "runs", groups.size())
    return out.reset_index()


def _magnitude(value: float) -> int:
    """The power of ten of the first figure: 0 for 1 … 9.99, −2 for 0.01."""
    return math.floor(math.log10(abs(value))) if value else 0
