"""The surroundings of a row: its text, or its image and patch."""

import pandas as pd
import pytest
import torch
from torch import nn

from saeutils.activations import save_activations
from saeutils.codes import encode
from saeutils.datasets import ImageData
from saeutils.store import TensorStore

X = torch.arange(100, 124).reshape(4, 6)


class Sae:
    W_dec = torch.eye(3)

    def encode(self, x):
        return x.relu()


def decode(tokens):
    return "".join(f" {token}" for token in tokens)


@pytest.fixture
def text(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(200, 3))
    return save_activations(
        model, X, "0", tmp_path / "s", positions="not first", shard_bytes=48,
        progress=False,
    )["0"]  # fmt: skip


def test_tokens_of_the_same_text_only(text, tmp_path):
    codes = encode(Sae(), text, tmp_path / "codes", progress=False)
    for store in (text, codes):
        for row in range(20):
            got = store.context(row, before=2, after=3)
            i, p = divmod(row, 5)
            p += 1
            assert got.record["id"] == i and got.record["position"] == p
            assert got.tokens == X[i, max(1, p - 2) : p + 4].tolist()
            assert got.tokens[got.place] == X[i, p] == got.record["token"]
    assert text.context(7, 1, 1).text(decode) == " 108« 109» 110"
    assert text.context(5, 1, 1).text(decode) == "« 107» 108"


def test_an_image_with_its_patch(tmp_path):
    images = ImageData(
        images=torch.randint(256, (5, 28, 28)).byte(),
        labels=torch.zeros(5, dtype=torch.int64),
        ids=torch.arange(5) + 70,
        split="test",
        name="noise",
    )
    model = nn.Sequential(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 2, 7, stride=7))
    layout = {"1": "batch d row column"}
    store = save_activations(
        model, images, "1", tmp_path, layout=layout, progress=False
    )["1"]
    got = store.context(2 * 16 + 6, images=images)
    assert (got.record["id"], got.record["row"], got.record["column"]) == (72, 1, 2)
    assert torch.equal(got.image, images.images[2])
    assert got.box == (7, 14, 7, 7) and got.tokens == []
    # The patch is what the row was computed from.
    top, left, height, width = got.box
    patch = got.image[top : top + height, left : left + width] / 255
    wanted = model[1](patch[None, None]).flatten().detach()
    torch.testing.assert_close(store[2 * 16 + 6 : 2 * 16 + 7][0], wanted)
    with pytest.raises(ValueError, match="no image with the id 70"):
        store.context(0, images=images.take([1, 2]))
    assert store.context(0).image is None


def test_rows_that_are_not_there_and_stores_in_memory(text):
    for row in (-1, 20):
        with pytest.raises(IndexError, match="20 rows"):
            text.context(row)
    memory = TensorStore(torch.ones(2, 3), pd.DataFrame({"id": [5, 6]}))
    assert memory.context(1).record == {"id": 6}
