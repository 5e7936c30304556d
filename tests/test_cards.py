"""A card says what a slow look at the data says; its page can be linked to."""

import re
from dataclasses import fields

import jaxtyping
import pytest
import torch
from nbformat import v4
from torch import nn
from torch.nn import functional as F

from saeutils import cards, plots
from saeutils.baselines import Dictionary
from saeutils.datasets import ImageData
from saeutils.examples import Codes, class_profile, top_examples
from saeutils.inversion import Method
from saeutils.meta import train_meta
from saeutils.report import execute, pages
from saeutils.report.cards import write_cards
from saeutils.sae import export, initial_params


@pytest.fixture
def unchecked():
    """What users get: no shape checks by type, so that our own messages show."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def image_data(n, first_id, seed):
    """Class c has its ink in quarter c, and noise elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 4
    images = torch.randint(0, 40, (n, 6, 6), generator=generator)
    for i, c in enumerate(labels.tolist()):
        y, x = 3 * (c // 2), 3 * (c % 2)
        images[i, y : y + 3, x : x + 3] += torch.randint(
            90, 200, (3, 3), generator=generator
        )
    ids = torch.arange(first_id, first_id + n)
    return ImageData(images.to(torch.uint8), labels, ids, "t", "quarters")


@pytest.fixture(scope="module")
def world():
    """Layer "0" measures the ink of each quarter; the head is linear in it; latents
    0 to 3 read one quarter each, 4 two of them, and 5 is dead."""
    train, test = image_data(200, 50, 0), image_data(60, 900, 1)
    model = nn.Sequential(nn.Linear(36, 4), nn.Linear(4, 4)).requires_grad_(False)
    quarters = torch.zeros(4, 6, 6)
    for c in range(4):
        y, x = 3 * (c // 2), 3 * (c % 2)
        quarters[c, y : y + 3, x : x + 3] = 1 / 9
    model[0].weight.copy_(quarters.flatten(1))
    model[0].bias.zero_()
    noise = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    model[1].weight.copy_(torch.eye(4) + 0.1 * noise)
    model[1].bias.zero_()
    params = initial_params("batchtopk", 6, torch.zeros(4))
    rows = torch.cat([torch.eye(4), torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 1]])])
    params["W_dec"] = F.normalize(rows, dim=1)
    params["W_enc_T"] = params["W_dec"].clone()
    params["b_enc"][5] = -100
    sae = export(params, "batchtopk", threshold=0.3)
    return model, sae, model[0](train.pixels), train, test


def made(world, latents, **options):
    model, sae, rows, train, test = world
    options = dict(method=Method(steps=20)) | options
    return cards.feature_cards(model, "0", sae, rows, train, test, latents, **options)


def test_a_latent_that_fires_on_one_digit_only(world):
    card = made(world, [2])[0]
    assert card.top_class == 2 and card.entropy == 0 and card.selectivity == 1
    assert card.class_share.tolist() == [0, 0, 1, 0]
    assert card.firing_count == 50 and card.n_rows == 200
    assert (card.labels == 2).all() and len(card.images) == 12
    assert card.counts.sum() == 50 and len(card.edges) == len(card.counts) + 1
    assert card.picture_answer == 2 and card.picture_ratio > 1
    assert card.picture[3:, :3].min() > card.picture[:3, 3:].max()


def test_images_are_joined_by_id(world):
    _, sae, rows, train, _ = world
    card = made(world, [4], n=5)[0]
    value, order = sae.encode(rows)[:, 4].topk(5)
    assert card.ids.tolist() == (order + 50).tolist()
    assert torch.equal(card.images, train.images[order])
    assert torch.equal(card.values, value) and torch.equal(
        card.labels, train.labels[order]
    )


def test_effects_are_those_of_a_linear_tail(world):
    """Taking out z W_dec changes the logits of a linear head by z W_dec Hᵀ."""
    model, sae, _, _, test = world
    for latent, card in zip((1, 4), made(world, [1, 4]), strict=True):
        acts = model[0](test.pixels)
        z = sae.encode(acts)[:, latent]
        fires = z > 0
        part = z[fires, None] * sae.W_dec[latent]
        want = (part @ model[1].weight.T).mean(0)
        effect = card.effect
        assert effect.n == fires.sum() > 0
        assert torch.allclose(effect.logits, want, atol=1e-5)
        before = model(test.pixels[fires]).argmax(1)
        after = model[1](acts[fires] - part).argmax(1)
        assert effect.changed == (before != after).sum()
        label = test.labels[fires]
        assert effect.accuracy_before == pytest.approx(
            (before == label).double().mean()
        )
        assert effect.accuracy_after == pytest.approx((after == label).double().mean())
    assert made(world, [1])[0].effect.changed > 0


def test_a_latent_silent_on_the_test_images_has_no_effect(world):
    model, sae, rows, train, test = world
    silent = test.take(test.labels != 2)
    card = cards.feature_cards(
        model, "0", sae, rows, train, silent, [2], method=Method(steps=2)
    )[0]
    assert card.effect.n == 0 and card.effect.changed == 0
    assert card.effect.logits.tolist() == [0] * 4
    assert "no test image" in plots.feature_card(card).to_json()


def test_neighbours_are_live_and_nearest(world):
    card = made(world, [0], n_near=3)[0]
    latents = [latent for latent, _ in card.neighbours]
    assert latents[0] == 4 and 5 not in latents and 0 not in latents
    assert card.neighbours[0][1] == pytest.approx(2**-0.5)
    _, sae, rows, train, _ = world
    best = sae.encode(rows)[:, 4].argmax()
    assert torch.equal(card.neighbour_images[0], train.images[best])


def test_meta_latents_of_a_card(world):
    _, sae, rows, train, _ = world
    profile = class_profile(Codes(sae, rows, labels=train.labels))
    fit = train_meta(sae.W_dec[profile.live], 3, k=2, held_out=0.4, steps=30)
    card = made(world, [4], meta=fit, profile=profile)[0]
    members = torch.zeros(6, 3)
    members[profile.live] = fit.codes(sae.W_dec[profile.live])
    assert [(m, w) for m, w, _ in card.metas] == [
        (m, members[4, m].item())
        for m in members[4].argsort(descending=True).tolist()
        if members[4, m] > 0
    ]
    for m, _, others in card.metas:
        assert 4 not in others and all(members[j, m] > 0 for j in others)


def test_dead_latents_are_refused(world, unchecked):
    with pytest.raises(ValueError, match=r"latents \[5\] never fire"):
        made(world, [1, 5])


# --- figures --------------------------------------------------------------------


def test_the_figure_holds_the_numbers(world):
    card = made(world, [2])[0]
    fig = plots.feature_card(card)
    bars = [t for t in fig.data if t.type == "bar"]
    assert list(bars[0].y) == card.counts.tolist()
    assert list(bars[1].y) == pytest.approx(card.class_mean.tolist())
    assert list(bars[2].y) == pytest.approx(card.effect.logits.tolist())
    assert sum(t.type == "heatmap" for t in fig.data) == 3
    words = fig.to_json()
    assert "Latent 2 of 0" in words and "50 of 200 images" in words
    assert all(getattr(card, f.name) is not None for f in fields(card))


def test_pictures_leave_white_what_is_missing(world):
    _, sae, rows, train, _ = world
    codes = Codes(sae, rows[:8], ids=train.ids[:8], labels=train.labels[:8])
    top = top_examples(codes, 3)
    got = cards.pictures([top[0], top[5]], train, 3)
    assert got.images.shape == (2, 3, 6, 6)
    assert len(got.captions[0]) == 2 and got.captions[1] == []
    assert (got.images[0, 2] == 0).all() and (got.images[1] == 0).all()
    assert got.captions[0][0].startswith("0 · ")
    with pytest.raises(ValueError, match="is not among"):
        cards.pictures([top[0]], train.take(slice(100, 200)), 3)


def test_meta_panels_lead_from_meta_latents_to_images(world):
    _, sae, rows, train, _ = world
    members = torch.zeros(6, 2)
    members[1, 0], members[2, 0], members[4, 1] = 0.2, 0.9, 0.5
    base = Codes(sae, rows, ids=train.ids, labels=train.labels)
    way = Dictionary(torch.eye(4)[:2], torch.zeros(4), signed=False)
    along = top_examples(Codes(way, rows, ids=train.ids, labels=train.labels), 5)
    groups = cards.meta_panels([0, 1], members, base, {"along": along}, train)
    assert groups["base latents"].captions == [["latent 2", "latent 1"], ["latent 4"]]
    best = sae.encode(rows).argmax(0)
    assert torch.equal(groups["base latents"].images[0, 0], train.images[best[2]])
    assert groups["images along"].images.shape == (2, 5, 6, 6)
    fig = plots.image_panels(groups, row_titles=["a", "b"], title="t")
    text = [note.text for note in fig.layout.annotations]
    assert {"<b>base latents</b>", "<b>images along</b>", "latent 2"} <= set(text)


def test_image_panels_put_each_image_in_its_group():
    one, two = torch.full((2, 1, 4, 4), 0.3), torch.full((2, 3, 4, 4), 0.9)
    two[1, 2] = 0.5
    texts = [["w"], ["x", "y", "z"]]
    fig = plots.image_panels({"a": (one, ()), "b": (two, texts)}, title="t")
    at = {note.text: (note.x, note.y) for note in fig.layout.annotations}
    assert at["w"][0] == at["x"][0] < at["y"][0] and at["w"][1] < at["x"][1]
    z = torch.as_tensor(fig.data[0].z)
    for value, count in ((0.3, 2), (0.9, 5), (0.5, 1)):
        assert ((z - value).abs() < 1e-6).sum() == 16 * count
    left = ((z - 0.3).abs() < 1e-6).nonzero()[:, 1].max()
    right = ((z - 0.9).abs() < 1e-6).nonzero()[:, 1].min()
    assert right - left > 10
    with pytest.raises(ValueError, match="same number of rows"):
        plots.image_panels({"a": (one, ()), "b": (two[:1], ())}, title="t")


# --- the page -------------------------------------------------------------------


def test_a_page_of_cards_stands_alone_and_has_anchors(world, tmp_path):
    figures = {f"latent {c.latent}": plots.feature_card(c) for c in made(world, [1, 2])}
    page = pages.write_figures(tmp_path / "new" / "cards.html", "Cards", figures)
    text = page.read_text(encoding="utf-8")
    assert '<section id="latent-1">' in text and 'href="#latent-2"' in text
    assert text.count("plotly-figure") >= 2
    assert not re.search(r'(src|href)="https?:', text)
    with pytest.raises(ValueError, match="differ"):
        pages.write_figures(page, "t", {"a b": None, "a-b": None})
    with pytest.raises(ValueError, match="need names"):
        pages.write_figures(page, "t", {})


def test_links_to_what_a_notebook_wrote_lead_there(tmp_path):
    made_in = tmp_path / "runs" / "n"
    made_in.mkdir(parents=True)
    (made_in / "cards.html").write_text("x")
    text = "[a](cards.html#latent-1) [b](missing.html) [c](https://x.org) [d](#here)"
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell(text)])
    run = execute.Run("n", "t", "q", "quick", {}, "2026-01-01T00:00:00")
    page = pages.notebook_page(notebook, run, tmp_path, (made_in, "runs/n"))
    links = re.findall(r'<a href="([^"]*)">[abcd]</a>', page)
    assert links == [
        "runs/n/cards.html#latent-1",
        "missing.html",
        "https://x.org",
        "#here",
    ]


def test_every_card_is_linked_once_under_its_heading(world, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_cards = made(world, [1, 2, 4])
    text = write_cards("runs/c.html", made_cards, {"Most": [2, 1], "Least": [4]})
    assert re.findall(r"\[(\d)\]\(runs/c\.html#(latent-\d)\)", text) == [
        ("2", "latent-2"),
        ("1", "latent-1"),
        ("4", "latent-4"),
    ]
    assert text.index("**Least:**") > text.index("[1]")
    page = (tmp_path / "runs/c.html").read_text(encoding="utf-8")
    assert page.count("<section id=") == 3
    with pytest.raises(ValueError, match="no card of latent 3"):
        write_cards("runs/c.html", made_cards, {"Most": [3]})
