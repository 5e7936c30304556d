"""What becomes of a labelled concept in SAEs: one latent, several, or other ones.

Everything is chosen on some rows and judged on others, because the best of thousands
of latents is good on the rows where it was chosen, whatever they say. And everything
is asked of null concepts, too: as many words, as frequent, with nothing in common.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saeutils import absorption
from saeutils.splitting import Coded, firing_scores, main_latents

if TYPE_CHECKING:
    import pandas as pd

NULL = "null: "


class Concepts(NamedTuple):
    """Which rows carry which concept, and which rows serve to choose."""

    truth: Mapping[str, Bool[np.ndarray, " rows"]]
    """Null concepts are named "null: " and the concept whose words they match."""
    choose: Bool[np.ndarray, " rows"]
    """Rows to choose latents and probes on; the others judge."""

    def half(self, choose: bool) -> dict[str, Bool[np.ndarray, " part"]]:
        """The truth on the rows to choose on, or on those to judge on."""
        part = self.choose if choose else ~self.choose
        return {name: label[part] for name, label in self.truth.items()}


def with_nulls(
    truth: Mapping[str, Bool[np.ndarray, " rows"]],
    token: Int[np.ndarray, " rows"],
    choose: Bool[np.ndarray, " rows"],
    *,
    seed: int = 0,
) -> Concepts:
    """The concepts, and after each its null (`absorption.matched_words`).

    Raises ValueError for a concept that is on no row, or on all, of either half.
    """
    for name, label in truth.items():
        for rows, what in ((choose, "to choose on"), (~choose, "to judge on")):
            if not 0 < label[rows].sum() < rows.sum():
                raise ValueError(
                    f"concept {name!r} is on {label[rows].sum()} of the {rows.sum()} "
                    f"rows {what}: take another, or more text"
                )
    both = {}
    for i, (name, label) in enumerate(truth.items()):
        both[name] = label
        both[NULL + name] = absorption.matched_words(token, label, seed=seed + i)
    return Concepts(both, choose)


def told(saes: Mapping[str, Coded], concepts: Concepts) -> "pd.DataFrame":
    """How well the firing of single latents tells each concept, and how many it takes.

    Args:
        saes: name -> codes of the labelled rows.

    Returns one row an SAE and concept: SAE, name, null (whether it is one), latent (the
    best where chosen), F1 (of that latent where judged), own (the concept's own
    latents, `splitting.main_latents`), own latents (their number), recall, precision
    (of "any of them fires", where judged).
    """
    import pandas as pd

    a, b = (concepts.half(choose) for choose in (True, False))
    rows = []
    for sae, coded in saes.items():
        choose, judge = coded.take(concepts.choose), coded.take(~concepts.choose)
        best = firing_scores(choose, np.stack([*a.values()], 1)).f1.argmax(1)
        f1 = firing_scores(judge, np.stack([*b.values()], 1)).f1
        for i, name in enumerate(concepts.truth):
            own = main_latents(choose, a[name])
            fired = np.asarray(judge.fires[:, own].sum(1)).ravel() > 0
            hits = (fired & b[name]).sum()
            row = {"SAE": sae, "name": name, "null": name.startswith(NULL)}
            row |= {"latent": int(best[i]), "F1": float(f1[i, best[i]])}
            row |= {"own": tuple(own), "own latents": len(own)}
            row["recall"] = hits / max(b[name].sum(), 1)
            rows.append(row | {"precision": hits / max(fired.sum(), 1)})
    return pd.DataFrame(rows)


def by_sae(frame: "pd.DataFrame", column: str, null: str) -> "pd.DataFrame":
    """One row a concept ("name"), one column an SAE, and "null", for `plots.effects`.

    null: where that column comes from: of the same concepts (the largest over the
        SAEs); or "F1" and the like, of the null concepts.
    """
    names = frame["name"][~frame["null"]].unique()
    saes = frame["SAE"].unique()
    wide = frame.pivot(index="name", columns="SAE", values=column)
    of_null = frame.pivot(index="name", columns="SAE", values=null).max(axis=1)
    source = names if null != column else [NULL + name for name in names]
    table = wide.loc[names, saes].assign(null=of_null.loc[source].to_numpy())
    return table.rename_axis(columns=None).reset_index()


def means(
    frame: "pd.DataFrame", column: str, *, null: bool = False
) -> dict[str, float]:
    """SAE -> mean of a column over concepts (over null concepts instead)."""
    groups = frame[frame["null"] == null].groupby("SAE", sort=False)
    return groups[column].mean().to_dict()


class Absorbed(NamedTuple):
    """Absorption of concepts in SAEs."""

    table: "pd.DataFrame"
    """One row an SAE and concept: SAE, name, null, rows (judged), silent and absorbed
    (in % of these), shuffled (absorbed, with the latents' directions shuffled)."""
    by: "pd.DataFrame"
    """One row a concept, SAE and absorbing latent, most tokens first: concept, SAE,
    latent, tokens (their number), on (the most frequent of them)."""


def absorbed(
    saes: Mapping[str, Coded],
    x: Float[Tensor, "rows d_in"],
    concepts: Concepts,
    own: "pd.DataFrame",
    words: Sequence[str] | np.ndarray,
    *,
    shuffles: int = 5,
    seed: int = 0,
    **how: float,
) -> Absorbed:
    """`absorption.absorption` of each concept where its probe finds it, and its null.

    Probes and own latents come from the rows to choose on.

    Args:
        own: as `told` returns it for the same SAEs.
        words: the text of each row.
        how: `above` and `least` of `absorption.absorption`.
    """
    import pandas as pd

    a, b = (concepts.half(choose) for choose in (True, False))
    judge = torch.from_numpy(~concepts.choose)
    probes = {n: absorption.concept_probe(x[~judge], label) for n, label in a.items()}
    found = {n: b[n] & probe.finds(x[judge]) for n, probe in probes.items()}
    latents = own.set_index(["SAE", "name"])["own"]
    text = np.asarray(words)[~concepts.choose]
    generator = torch.Generator().manual_seed(seed)
    rows, by = [], []
    for sae, coded in saes.items():
        z, W = coded.take(~concepts.choose).z, coded.W_dec
        orders = [torch.randperm(len(W), generator=generator) for _ in range(shuffles)]
        for name, probe in probes.items():
            given = probe, found[name], latents[sae, name]
            one = absorption.absorption(z, W, *given, **how)
            null = [absorption.absorption(z, W[o], *given, **how).rate for o in orders]
            row = {"SAE": sae, "name": name, "null": name.startswith(NULL)}
            row |= {"rows": one.n, "silent": 100 * one.silent}
            row |= {"absorbed": 100 * one.rate, "shuffled": 100 * float(np.mean(null))}
            rows.append(row)
            for latent in np.unique(one.latents) if not row["null"] else ():
                on = text[one.rows[one.latents == latent]]
                kinds, counts = np.unique(on, return_counts=True)
                most = [str(k).strip() for k in kinds[np.argsort(-counts)][:5]]
                by.append([name, sae, latent, len(on), ", ".join(most)])
    names = ["concept", "SAE", "latent", "tokens", "on"]
    ranked = pd.DataFrame(by, columns=names).sort_values(
        "tokens", ascending=False, kind="stable", ignore_index=True
    )
    return Absorbed(pd.DataFrame(rows), ranked)
