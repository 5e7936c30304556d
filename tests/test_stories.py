"""Story text: where it comes from, how it is split, and how it becomes tokens."""

import gzip
import json
import lzma

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from saeutils import grammar
from saeutils.stories import (
    END,
    StoryData,
    read_stories,
    shuffled_words,
    stories,
    tokens,
)

TEXTS = [f"Tom saw {i} cats.\nHe was happy." for i in range(50)]


@pytest.fixture(scope="module")
def tokenizer():
    """A word a token; <e> begins, ends and pads."""
    words = "Tom saw cats . He was happy 0 1 2 3 4"
    known = {word: i for i, word in enumerate(["<e>", "?", *words.split()])}
    own = Tokenizer(models.WordLevel(known, unk_token="?"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<e>")


def write(path, texts):
    content = "".join(f"{text}\n{END}\n" for text in texts).encode()
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(content))
    return path


def test_the_embedded_text_is_there():
    parts = {split: stories(split) for split in ("train", "test")}
    assert len(parts["train"]) > 3 * len(parts["test"]) > 1000
    assert not set(parts["train"].texts) & set(parts["test"].texts)
    assert not set(parts["train"].ids) & set(parts["test"].ids)
    whole = sorted([*parts["train"].ids, *parts["test"].ids])
    assert whole == list(range(len(whole)))
    assert sum(map(len, parts["train"].texts)) > 1.5e6
    assert all("<|" not in text for text in parts["train"].texts)


def test_the_grammar_gives_ids_that_find_the_labels():
    data = stories("test", "grammar", n=5, seed=3)
    assert data.texts == [grammar.story(3, int(i)).text for i in data.ids]
    assert not set(data.texts) & set(stories("train", "grammar", n=500, seed=3).texts)


@pytest.mark.parametrize("name", ["s.txt", "s.txt.gz", "s.txt.xz"])
def test_a_file_is_split_by_document_the_same_way_each_time(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    train, test = stories("train", path), stories("test", str(path))
    assert sorted([*train.texts, *test.texts]) == sorted(TEXTS)
    assert 2 <= len(test) <= 20
    for part in (train, test):
        assert part.texts == [TEXTS[i] for i in part.ids]
    # A story stays in its split when others come before it.
    moved = stories("test", write(tmp_path / "more.txt", ["A new one.", *TEXTS]))
    assert set(moved.texts) - {"A new one."} == set(test.texts)


def test_a_folder_with_splits_of_its_own_keeps_them(tmp_path):
    write(tmp_path / "TinyStories-train.txt", TEXTS[:30])
    rows = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[30:])
    (tmp_path / "TinyStories-valid.jsonl").write_text(rows)
    assert stories("train", tmp_path).texts == TEXTS[:30]
    assert stories("test", tmp_path, n=4).texts == TEXTS[30:34]


def test_parquet(tmp_path):
    import pandas as pd

    pd.DataFrame({"text": TEXTS}).to_parquet(tmp_path / "a.parquet")
    assert read_stories(tmp_path / "a.parquet") == TEXTS


def test_take_keeps_ids_and_the_fingerprint_sees_every_change():
    data = stories("test", n=20)
    part = data.take([3, 5])
    assert part.texts == [data[3], data[5]] and list(part.ids) == list(data.ids[[3, 5]])
    assert data.fingerprint == stories("test", n=20).fingerprint
    changed = StoryData([*data.texts[:-1], "x"], data.ids, data.split, data.name)
    moved = StoryData(data.texts, data.ids + 1, data.split, data.name)
    assert len({d.fingerprint for d in (data, part, changed, moved)}) == 4


def test_shuffled_words_are_the_same_words():
    data = stories("test", n=5)
    mixed = shuffled_words(data, seed=1)
    assert mixed.texts == shuffled_words(data, seed=1).texts != data.texts
    assert list(mixed.ids) == list(data.ids)
    for before, after in zip(data.texts, mixed.texts, strict=True):
        assert sorted(before.split()) == sorted(after.split())


def test_one_story_a_row(tokenizer):
    data = StoryData(TEXTS[:3], np.array([7, 8, 9]), "train", "own")
    ids, documents, spans = tokens(data, tokenizer, 12)
    assert ids.shape == (3, 12) and list(documents) == [7, 8, 9]
    assert ids[0].tolist() == [0, 2, 3, 9, 4, 5, 6, 7, 8, 5, 0, 0]
    for text, row, places in zip(data.texts, ids, spans, strict=True):
        for token, (start, stop) in zip(row.tolist(), places, strict=True):
            word = text[start:stop] or "<e>"
            assert tokenizer.convert_tokens_to_ids(word) == token
    cut = tokens(data, tokenizer, 4)
    assert cut.ids.tolist() == ids[:, :4].tolist()
    assert [len(places) for places in cut.spans] == [4, 4, 4]


def test_packed_rows_are_full_and_know_their_first_story(tokenizer):
    data = StoryData(TEXTS[:5], np.arange(10, 15), "train", "own")
    whole = tokens(data, tokenizer, 50, packed=True)
    assert whole.ids.shape == (1, 50) and (whole.ids == 0).sum() == 5
    rows = tokens(data, tokenizer, 8, packed=True)
    assert rows.ids.ravel().tolist() == whole.ids.ravel()[:48].tolist()
    assert list(rows.documents) == [10, 10, 11, 12, 13, 14]


def test_bad_input_is_refused_in_words(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match='"train" or "test", got \'dev\''):
        stories("dev")
    with pytest.raises(ValueError, match="holds no story"):
        stories("train", write(tmp_path / "empty.txt", []))
    with pytest.raises(FileNotFoundError, match='corpus="embedded"'):
        stories("train", tmp_path / "absent.txt")
    damaged = write(tmp_path / "d.txt.xz", TEXTS)
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"d\.txt\.xz cannot be read"):
        stories("train", damaged)
    (tmp_path / "no.jsonl").write_text('{"story": "x"}\n')
    with pytest.raises(ValueError, match="stories stand in `text`"):
        stories("train", tmp_path / "no.jsonl")
    with pytest.raises(ValueError, match="one id for each"):
        StoryData(TEXTS, np.arange(3), "train", "own")
    data = StoryData(TEXTS[:3], np.arange(3), "train", "own")
    with pytest.raises(ValueError, match="30 tokens in all are shorter"):
        tokens(data, tokenizer, 64, packed=True)
    with pytest.raises(ValueError, match="2 positions"):
        tokens(data, tokenizer, 1)


def test_without_a_hub_the_error_names_the_embedded_text():
    with pytest.raises(ConnectionError, match=r'cannot be had.*corpus="embedded"'):
        stories("train", "roneneldan/TinyStories", n=3)
