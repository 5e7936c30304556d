"""Activations of several corpora as one set of rows, with labels where known."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from saeutils import grammar
from saeutils.context import token_texts
from saeutils.facts import row_concepts
from saeutils.stories import StoryData
from saeutils.story_rows import story_rows

if TYPE_CHECKING:
    import pandas as pd


class MixedRows(NamedTuple):
    """Tokens of stories of several corpora, those with labels first."""

    rows: Float[Tensor, "rows d_in"]
    records: "pd.DataFrame"
    """Of each row its corpus, story (`id`), position, token, and `word` (its text)."""
    labels: Bool[np.ndarray, "labelled concepts"]
    """Concepts of the first rows, those of the grammar's stories."""
    concepts: list[str]

    @property
    def first_half(self) -> Bool[np.ndarray, " labelled"]:
        """The labelled rows of the first half of the labelled stories."""
        ids = self.records["id"].to_numpy()[: len(self.labels)]
        return ids <= np.median(np.unique(ids))


def mixed_rows(
    model: nn.Module,
    texts: Sequence[StoryData],
    hook: str,
    folder: str | Path,
    *,
    context: int = 256,
) -> MixedRows:
    """A model's activations on all tokens of the texts, in memory (and saved on disk).

    Args:
        texts: stories of the grammar (corpus seed 0), labelled, before others.
        folder: as `story_rows` takes it.

    Raises ValueError when labelled stories do not come first.
    """
    import pandas as pd

    of_grammar = [text.name == "grammar" for text in texts]
    if sorted(of_grammar, reverse=True) != of_grammar:
        raise ValueError(
            f"texts {[text.name for text in texts]}: those of the grammar come first"
        )
    names = grammar.concepts()
    rows, records, labels = [], [], [np.zeros((0, len(names)), bool)]
    for text in texts:
        found = story_rows(model, text, [hook], folder, context=context)
        rows.append(found.stores[hook][:])
        records.append(found.records.assign(corpus=text.name))
        if text.name == "grammar":
            labels.append(row_concepts(records[-1], found.coded, names))
    table = pd.concat(records, ignore_index=True)
    table["word"] = token_texts(model.tokenizer, table["token"].tolist())
    return MixedRows(torch.cat(rows), table, np.concatenate(labels), names)
