"""What is known of each row of text: its token, the one before, and its concepts."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int

from saeutils import grammar
from saeutils.detection import Member

if TYPE_CHECKING:
    import pandas as pd

    from saeutils.stories import Tokens


class Facts(NamedTuple):
    """What is known of each row."""

    concepts: list[str]
    member: Member
    """Which rows carry which concept."""
    properties: dict[str, Int[np.ndarray, " rows"]]
    """Kind of label -> category of each row, −1 for none, as {"on": token, …}."""


def row_facts(
    records: "pd.DataFrame", names: Sequence[str] = (), member: Member | None = None
) -> Facts:
    """Tokens and concepts of each row ("on"), and of the row before it ("after").

    Args:
        records: provenance of the rows (id, position, token).
        names, member: concepts, where they are known (else None); each comes a second
            time, as that of the token before.
    """
    before, token = row_before(records), records["token"].to_numpy()
    if member is None:
        names, member = [], np.zeros((len(token), 0), bool)
    known = before >= 0
    both = np.hstack([member, member[before] & known[:, None]])
    properties = {"on": token, "after": np.where(known, token[before], -1)}
    return Facts([*names, *(f"after {name}" for name in names)], both, properties)


def row_concepts(
    records: "pd.DataFrame", coded: "Tokens", names: Sequence[str], *, seed: int = 0
) -> Member:
    """The concepts of each row of activations of grammar stories, by id and position.

    Args:
        records: provenance of the rows (id, position).
        coded: the tokens of the stories that the model was given, not packed.
        seed: of the grammar's corpus.

    Raises ValueError for a row of a story that is not among them.
    """
    spans = dict(zip(coded.documents.tolist(), coded.spans, strict=True))
    ids, which = np.unique(records["id"].to_numpy(), return_inverse=True)
    if unknown := set(ids.tolist()) - spans.keys():
        raise ValueError(f"story {min(unknown)} is not among the {len(spans)} given")
    position = records["position"].to_numpy()
    member = np.zeros((len(records), len(names)), bool)
    order = np.argsort(which, kind="stable")
    for i, rows in zip(ids.tolist(), np.split(order, _ends(which)), strict=True):
        carried = grammar.token_concepts(grammar.story(seed, i), spans[i], names)
        member[rows] = carried[position[rows]]
    return member


def row_before(records: "pd.DataFrame") -> Int[np.ndarray, " rows"]:
    """The row of the token before each row's own in its story; −1 where none is."""
    keys = records[["id", "position"]]
    before = keys.assign(position=keys["position"] + 1, row=np.arange(len(keys)))
    joined = keys.merge(before, on=["id", "position"], how="left")
    return joined["row"].fillna(-1).to_numpy().astype(np.int64)


def _ends(which: np.ndarray) -> np.ndarray:
    return np.cumsum(np.bincount(which))[:-1]
