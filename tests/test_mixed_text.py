"""Rows of several corpora, with the right labels, words and stories."""

import numpy as np
import pytest

from saeutils import grammar
from saeutils.mixed_text import mixed_rows
from saeutils.models import story_model
from saeutils.stories import StoryData, stories

HOOK = "blocks.0.hook_resid_mid"


@pytest.fixture(scope="module")
def model():
    return story_model("story-1L")


def test_labels_words_and_stories_belong_to_their_rows(model, tmp_path):
    made, other = stories("test", "grammar", n=3), stories("test", n=2)
    data = mixed_rows(model, [made, other], HOOK, tmp_path, context=64)
    records = data.records
    assert len(data.rows) == len(records) and data.rows.shape[1] == model.cfg.d_model
    assert set(records["corpus"][: len(data.labels)]) == {"grammar"}
    assert set(records["corpus"][len(data.labels) :]) == {other.name}
    assert set(records["id"]) == {*made.ids.tolist(), *other.ids.tolist()}
    assert data.first_half.sum() == records["id"].isin(made.ids[:2]).sum()
    names = grammar.story(0, int(made.ids[0])).cast
    is_name = data.labels[:, data.concepts.index("name")]
    whole = records["word"].str.strip().isin([names["A"].name, names["B"].name])
    first = (records["id"] == made.ids[0]).to_numpy() & whole.to_numpy()
    assert is_name[first[: len(is_name)]].all() and 0 < is_name.sum() < len(is_name) / 2
    # The same stories are read alone as well: rows do not depend on their neighbours.
    alone = mixed_rows(model, [made], HOOK, tmp_path / "alone", context=64)
    np.testing.assert_allclose(alone.rows, data.rows[: len(alone.rows)], atol=1e-2)


def test_labelled_stories_come_first(model, tmp_path):
    plain = StoryData(["A dog ran."], np.array([7]), "test", "mine")
    with pytest.raises(ValueError, match="come first"):
        mixed_rows(model, [plain, stories("test", "grammar", n=1)], HOOK, tmp_path)
    assert not list(tmp_path.iterdir())
