"""All that is known about a latent, as plain data for one page."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Float, UInt8
from torch import Tensor

from saeutils.datasets import ImageData
from saeutils.examples import Codes, Examples, TopExamples, top_examples


class Pictures(NamedTuple):
    """Images in rows, with the text under each; white where there is none."""

    images: UInt8[Tensor, "rows columns h w"]
    captions: list[list[str]]


def pictures(examples: Sequence[Examples], data: ImageData, columns: int) -> Pictures:
    """The images of examples, joined by id: a row for each, `columns` long.

    Raises:
        ValueError: an example whose id is not among the data's.
    """
    position = {int(item): i for i, item in enumerate(data.ids)}
    images = data.images.new_zeros(len(examples), columns, *data.images.shape[1:])
    captions = []
    for row, example in enumerate(examples):
        ids = example.ids[:columns].tolist()
        if missing := [item for item in ids if item not in position]:
            raise ValueError(
                f"image {missing[0]} is not among the {len(data)} images given: pass "
                "those that the codes were computed from"
            )
        if ids:
            images[row, : len(ids)] = data.images[[position[item] for item in ids]]
        labels = example.labels
        texts = [f"{value:.3g}" for value in example.values[:columns].tolist()]
        if labels is not None:
            pairs = zip(labels.tolist(), texts, strict=False)
            texts = [f"{label} · {text}" for label, text in pairs]
        captions.append(texts)
    return Pictures(images, captions)


def meta_panels(
    meta_latents: Sequence[int],
    members: Float[Tensor, "d_base d_meta"],
    base: Codes,
    ways: Mapping[str, TopExamples],
    data: ImageData,
    *,
    n_members: int = 3,
    n_images: int = 5,
) -> dict[str, Pictures]:
    """Meta-latent → base latents → images, a row each, for `plots.image_panels`.

    Args:
        members: meta-latents of each base latent; the strongest `n_members` are shown
            by their own strongest image.
        base: codes of the base SAE on `data`.
        ways: examples of the meta-latents, by the way they were found.
    """
    chosen = members[:, list(meta_latents)]
    strongest = [
        [i for i in column.topk(n_members).indices.tolist() if column[i] > 0]
        for column in chosen.T
    ]
    every = {i for latents in strongest for i in latents}
    top = top_examples(base, 1, latents=every)
    images = data.images.new_zeros(len(strongest), n_members, *data.images.shape[1:])
    captions = []
    for row, latents in enumerate(strongest):
        if latents:
            images[row, : len(latents)] = pictures(
                [top[i] for i in latents], data, 1
            ).images[:, 0]
        captions.append([f"latent {i}" for i in latents])
    groups = {"base latents": Pictures(images, captions)}
    for way, examples in ways.items():
        found = [examples[int(m)] for m in meta_latents]
        groups[f"images {way}"] = pictures(found, data, n_images)
    return groups
