"""Where a row comes from: the text around a token, the image around a patch."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import UInt8
from torch import Tensor

from saeutils.datasets import ImageData


class Context(NamedTuple):
    """A row's own record, and what lies around it."""

    record: dict[str, Any]
    """Provenance of the row."""
    tokens: list[int]
    """Token ids of the same text around it, in order; empty when there are none."""
    place: int
    """tokens[place] is the row's own."""
    image: UInt8[Tensor, "height width"] | None
    """The image with that id, when images were given."""
    box: tuple[int, int, int, int] | None
    """Top, left, height and width of the row's patch, in pixels; None without one."""

    def text(self, decode: Callable[[list[int]], str], marks: str = "«»") -> str:
        """The text, with the row's own token between two marks.

        decode: token ids -> text, such as a tokenizer's `decode`.
        """
        before, own, after = (
            decode(part) if part else ""
            for part in (
                self.tokens[: self.place],
                self.tokens[self.place : self.place + 1],
                self.tokens[self.place + 1 :],
            )
        )
        return f"{before}{marks[0]}{own}{marks[1]}{after}"


def context(
    store: Any,
    row: int,
    before: int = 10,
    after: int = 10,
    images: ImageData | None = None,
) -> Context:
    """What lies around a row of a store or of codes; reads its neighbours' records.

    Tokens that made no row (padding, or left out) are not there. Raises IndexError
    for a row that is not there, and ValueError for images without its id.
    """
    n = len(store)
    if not 0 <= row < n:
        raise IndexError(f"row {row} of a store of {n} rows")
    settings = getattr(store, "manifest", {}).get("settings") or {}
    start = max(0, row - before)
    near = store.records(start, min(n, row + after + 1))
    record = near.iloc[row - start].to_dict()
    tokens, place = [], 0
    if {"id", "position", "token"} <= set(near):
        same = near[near["id"] == record["id"]].drop_duplicates("position")
        tokens = same["token"].tolist()
        place = same["position"].tolist().index(record["position"])
    image = box = None
    if images is not None:
        found = (images.ids == record["id"]).nonzero()
        if not len(found):
            raise ValueError(f"no image with the id {record['id']} in {images.name}")
        image = images.images[int(found[0])]
        if settings.get("grid") and record.get("row", -1) >= 0:
            rows, columns = settings["grid"]
            height, width = image.shape[0] // rows, image.shape[1] // columns
            top, left = record["row"] * height, record["column"] * width
            box = (int(top), int(left), height, width)
    return Context(record, tokens, place, image, box)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as it reads inside a text, the blank before it included.

    `tokenizer.decode([token])` alone drops that blank with some tokenizers (those of
    SentencePiece), so each is decoded behind another token.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1]
    shown = len(tokenizer.decode([anchor]))
    kinds = {i: tokenizer.decode([anchor, i])[shown:] for i in set(ids)}
    return [kinds[i] for i in ids]
