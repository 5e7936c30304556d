"""Stories as a model sees them: activations on disk, and what splicing there needs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jaxtyping import Bool, Int64
from torch import Tensor, nn

from saeutils.activations import model_fingerprint, save_activations
from saeutils.language import Pair, next_tokens, story_positions
from saeutils.store import ActivationStore
from saeutils.stories import StoryData, Tokens, tokens

if TYPE_CHECKING:
    import pandas as pd


class StoryRows(NamedTuple):
    """Some stories and one model."""

    stores: dict[str, ActivationStore]
    """By hook; a row is a token of a story, in order of stories and positions."""
    pair: Pair
    """Tokens and next tokens, as `splicing` and `metrics` take them."""
    where: Bool[Tensor, "n context"]
    """The positions that are rows: neither BOS nor padding."""
    coded: Tokens
    """The stories as the model was given them."""

    @property
    def records(self) -> "pd.DataFrame":
        """Of each row its story (`id`), `position` and `token`."""
        return next(iter(self.stores.values())).provenance

    @property
    def token(self) -> Int64[Tensor, " rows"]:
        """The token of each row."""
        return self.pair[0][self.where]

    @property
    def previous(self) -> Int64[Tensor, " rows"]:
        """The token before each row's; BOS for the first one."""
        return self.pair[0].roll(1, 1)[self.where]

    @property
    def position(self) -> Int64[Tensor, " rows"]:
        """The place of each row in its story; the first token stands at 1."""
        return self.where.nonzero()[:, 1]


def story_rows(
    model: nn.Module,
    text: StoryData,
    hooks: Sequence[str],
    folder: str | Path,
    *,
    context: int = 256,
    dtype: str = "float16",
    batch_size: int = 32,
    progress: bool = False,
) -> StoryRows:
    """Save a model's activations on every token of the stories, or open them.

    Args:
        folder: each model, split and number of stories gets a folder of its own in it,
            named after the weights.
        context: tokens of a story at most.
        dtype, batch_size, progress: as `save_activations` takes them.

    Raises ValueError as `save_activations` and `next_tokens` do.
    """
    coded = tokens(text, model.tokenizer, context)
    where = story_positions(coded)
    name = f"{text.split}-{len(text)}-{context}-{text.fingerprint[:8]}"
    stores = save_activations(
        model,
        coded.ids,
        hooks,
        Path(folder) / model_fingerprint(model)[:12] / name,
        positions=where.numpy(),
        provenance={"id": coded.documents},
        dtype=dtype,
        batch_size=batch_size,
        progress=progress,
    )
    return StoryRows(stores, next_tokens(model, coded), where, coded)
