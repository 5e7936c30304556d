"""All that is known about a latent, as plain data for one page; and meta-latents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from saeutils import inversion, readouts
from saeutils.datasets import ImageData
from saeutils.examples import (
    ClassProfile,
    Codes,
    Examples,
    TopExamples,
    class_profile,
    top_examples,
)
from saeutils.inversion import METHODS, Method
from saeutils.meta import MetaSAE
from saeutils.pictures import ImageStats, image_stats

BINS = 30


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


class Effect(NamedTuple):
    """What the model does without a latent, on the test images on which it fires.

    The latent's part, z · W_dec, is taken out of the activations; what the SAE leaves
    unexplained stays in.
    """

    n: int
    """Test images on which it fires; on the others nothing changes."""
    logits: Float[Tensor, " classes"]
    """Mean of logit with the latent − logit without it."""
    changed: int
    """Images whose answer changes."""
    accuracy_before: float
    accuracy_after: float
    """On these images, in [0, 1]; NaN when there are none."""
    changed_by_chance: int
    """Images whose answer changes when a random direction, as long, is taken out."""


@dataclass(frozen=True, eq=False)
class Card:
    """A latent on one page (`plots.feature_card`)."""

    latent: int
    hook: str
    n_rows: int
    firing_count: int
    """Of n_rows training images."""
    top_class: int
    selectivity: float
    entropy: float
    """Class entropy in bits."""
    classes: Int64[Tensor, " c"]
    class_mean: Float64[Tensor, " c"]
    """Mean activation on the images of each class."""
    class_share: Float64[Tensor, " c"]
    """Share of the images of each class on which it fires."""
    images: UInt8[Tensor, "m h w"]
    """The strongest, each once, with their labels, ids and activations."""
    labels: Int64[Tensor, " m"]
    ids: Int64[Tensor, " m"]
    values: Float32[Tensor, " m"]
    counts: Int64[np.ndarray, " bins"]
    edges: Float64[np.ndarray, " bins+1"]
    """Histogram of its activations where it fires."""
    picture: Float[Tensor, "h w"]
    """By ascent in pixel space."""
    picture_ratio: float
    """The latent's activation on it, in maxima of the data."""
    picture_answer: int
    """Class that the model sees in it."""
    effect: Effect
    neighbours: list[tuple[int, float]]
    """Latents with the nearest decoder rows, and their cosines."""
    neighbour_images: UInt8[Tensor, "k h w"]
    """The strongest image of each."""
    metas: list[tuple[int, float, list[int]]]
    """Its meta-latents with their weights, and other latents that have them most."""


def feature_cards(
    model: nn.Module,
    hook: str,
    sae: Any,
    rows: Any,
    images: ImageData,
    test_images: ImageData,
    latents: Sequence[int],
    *,
    profile: ClassProfile | None = None,
    meta: MetaSAE | None = None,
    stats: ImageStats | None = None,
    method: Method = METHODS["PCA + prior"],
    n: int = 12,
    n_near: int = 5,
) -> list[Card]:
    """Cards of some latents; all of them together cost a few passes over the rows.

    Args:
        rows: activations of `images` at `hook`, in the same order, with their ids and
            labels if it is a store that knows them.
        profile: `class_profile` of the codes, when it is at hand.
        meta: a meta-SAE on the decoder rows of the live latents.
        n: strongest images; n_near: nearest latents.

    Raises:
        ValueError: a latent that never fires on the rows, or rows of other images.
    """
    codes = Codes(sae, rows, ids=images.ids, labels=images.labels)
    profile = class_profile(codes) if profile is None else profile
    latents = [int(i) for i in latents]
    if dead := [i for i in latents if profile.firing_counts[i] == 0]:
        raise ValueError(
            f"latents {dead} never fire on these {codes.n_rows:,} rows: a card of them "
            "would be empty; choose among profile.live"
        )
    unit = F.normalize(sae.W_dec.detach(), dim=1)
    cosine = (unit[latents] @ unit.T).where(profile.live, -2.0)
    cosine[range(len(latents)), latents] = -2.0
    near = cosine.topk(min(n_near, int(profile.live.sum()) - 1), dim=1)
    top = top_examples(codes, n, latents={*latents, *near.indices.flatten().tolist()})
    histograms = _histograms(codes, latents)
    readout = readouts.latents(model, hook, sae)
    known = readouts.strongest(readout, images, 1)
    stats = image_stats(images) if stats is None else stats
    made = inversion.maximise(readout, latents, known.maxima, stats, method, seeds=1)
    drawn = made.images[:, 0]
    with torch.no_grad():
        answers = readout(drawn)[1].argmax(1)
    effects = ablation_effects(model, hook, sae, test_images, latents)
    metas = _meta_members(sae, profile, meta, latents)
    out = []
    for i, latent in enumerate(latents):
        own = top[latent]
        others = near.indices[i].tolist()
        out.append(
            Card(
                latent=latent,
                hook=hook,
                n_rows=codes.n_rows,
                firing_count=int(profile.firing_counts[latent]),
                top_class=int(profile.top_class[latent]),
                selectivity=float(profile.selectivity[latent]),
                entropy=float(profile.entropy[latent]),
                classes=profile.classes,
                class_mean=profile.mean[latent],
                class_share=profile.share[latent],
                images=pictures([own], images, len(own.ids)).images[0],
                labels=own.labels,
                ids=own.ids,
                values=own.values,
                edges=histograms[i][1],
                counts=histograms[i][0],
                picture=drawn[i].view(stats.shape),
                picture_ratio=float(made.score[i, 0]),
                picture_answer=int(answers[i]),
                effect=effects[i],
                neighbours=list(zip(others, near.values[i].tolist(), strict=True)),
                neighbour_images=pictures([top[j] for j in others], images, 1).images[
                    :, 0
                ],
                metas=metas[i],
            )
        )
    return out


@torch.no_grad()
def ablation_effects(
    model: nn.Module,
    hook: str,
    sae: Any,
    data: ImageData,
    latents: Sequence[int],
    *,
    seed: int = 0,
) -> list[Effect]:
    """What each latent does in the model, by taking out its part, z · W_dec."""
    generator = torch.Generator().manual_seed(seed)
    pixels = data.pixels
    acts, logits = readouts.run(model, hook, pixels)
    z = torch.cat([sae.encode(a)[:, list(latents)] for a in acts.split(2048)])
    out = []
    for value, latent in zip(z.T, latents, strict=True):
        fires = (value > 0).nonzero().flatten()
        row = sae.W_dec[latent]
        noise = torch.randn(len(row), generator=generator).to(row)
        noise *= row.norm() / noise.norm()
        before, label = logits[fires], data.labels[fires]
        answers = []
        for direction in (row, noise):
            if len(fires):
                change = -value[fires, None] * direction
                _, after = readouts.run(model, hook, pixels[fires], add=change)
            else:
                after = before
            answers.append(after)
        after = answers[0]
        said = before.argmax(1)
        out.append(
            Effect(
                n=len(fires),
                logits=(before - after).mean(0) if len(fires) else 0 * logits[0],
                changed=int((after.argmax(1) != said).sum()),
                accuracy_before=(said == label).double().mean().item(),
                accuracy_after=(after.argmax(1) == label).double().mean().item(),
                changed_by_chance=int((answers[1].argmax(1) != said).sum()),
            )
        )
    return out


def _histograms(
    codes: Codes, latents: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each latent's positive activations: counts and edges, from zero up."""
    position = torch.full((codes.d_sae,), -1)
    position[list(latents)] = torch.arange(len(latents))
    values: list[list[np.ndarray]] = [[] for _ in latents]
    for chunk in codes:
        which = position[chunk.latent]
        for i in which.unique().tolist():
            if i >= 0:
                values[i].append(chunk.value[which == i].numpy())
    together = [np.concatenate(parts).astype(np.float64) for parts in values]
    return [np.histogram(own, BINS, (0, own.max())) for own in together]


def _meta_members(
    sae: Any,
    profile: ClassProfile,
    meta: MetaSAE | None,
    latents: Sequence[int],
    most: int = 3,
) -> list[list[tuple[int, float, list[int]]]]:
    """Of each latent its meta-latents, and who else has them."""
    if meta is None:
        return [[] for _ in latents]
    live = profile.live.nonzero().flatten()
    members = sae.W_dec.new_zeros(len(sae.W_dec), len(meta.sae.W_dec))
    members[live] = meta.codes(sae.W_dec[live])
    out = []
    for latent in latents:
        weights, own = members[latent].topk(min(most, members.shape[1]))
        found = []
        for weight, m in zip(weights.tolist(), own.tolist(), strict=True):
            if weight > 0:
                ranked = members[:, m].argsort(descending=True)[: most + 1].tolist()
                others = [j for j in ranked if j != latent and members[j, m] > 0]
                found.append((m, weight, others[:most]))
        out.append(found)
    return out
