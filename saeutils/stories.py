"""Story text with stable ids: embedded, from the grammar, from files, or from the hub.

A story keeps the id it was born with, and its split: ids travel with rows through
activations, stores and plots. A corpus is split by document, never inside one.
"""

import gzip
import hashlib
import json
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from saeutils import grammar
from saeutils.datasets import data_folder

END = "<|endoftext|>"  # the line after each story in a .txt file
TEST_SHARE = 0.2  # of the stories of a corpus without splits of its own
GRAMMAR_STORIES = 20_000  # of a split, unless n says otherwise
_OPENERS = {".gz": gzip.open, ".xz": lzma.open}
_SPLITS = {"train": ("train",), "test": ("test", "valid", "validation", "eval")}
_ALTERNATIVE = 'the embedded text needs no network: corpus="embedded", or "grammar"'


@dataclass(frozen=True, eq=False)
class StoryData:
    """Stories with stable ids: a subset keeps the ids of its parent."""

    texts: list[str]
    ids: Int64[np.ndarray, " n"]
    split: str
    name: str

    def __post_init__(self) -> None:
        if len(self.texts) != len(self.ids):
            raise ValueError(
                f"{len(self.texts)} texts and {len(self.ids)} ids: one id for each text"
            )
        if not self.texts:
            raise ValueError(f"the corpus {self.name} ({self.split}) holds no story")

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, i: int) -> str:
        return self.texts[i]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over ids and texts: equal means equal data."""
        digest = hashlib.sha256(self.ids.astype("<i8").tobytes())
        for text in self.texts:
            digest.update(f"{len(text)} {text}".encode())
        return digest.hexdigest()

    def take(self, index: slice | Sequence[int] | np.ndarray) -> "StoryData":
        """The stories at `index` (positions, a mask, or a slice), with their ids."""
        places = np.arange(len(self))[index]
        texts = [self.texts[i] for i in places]
        return StoryData(texts, self.ids[places], self.split, self.name)


def stories(
    split: str = "train",
    corpus: str | Path = "embedded",
    *,
    n: int | None = None,
    seed: int = 0,
) -> StoryData:
    """Stories of a corpus, `split` "train" or "test".

    Args:
        corpus: "embedded": text sampled from stories15M, unseen by the embedded story
            models in either split. "grammar": story i of corpus `seed` has the id i
            (test ids start at 10⁹), labelled by `grammar.story(seed, id)`. A path: a
            file .txt (stories end with a line `<|endoftext|>`), .jsonl or .parquet
            (column `text`), .txt and .jsonl also as .gz or .xz, or a folder of such
            files, those named train… or test…/valid… for the splits where there are
            such. Else the name of a dataset on the hub, as "roneneldan/TinyStories".
        n: the first n stories only (of the grammar 20,000 unless given).

    A corpus without splits of its own is split by the hash of each text: a fifth is
    test, and the same story is never in both.

    Raises:
        ValueError: another split, n < 1, a damaged or empty corpus.
        FileNotFoundError, ConnectionError: a path or dataset that is not to be had.
    """
    if split not in _SPLITS:
        raise ValueError(f'split is "train" or "test", got {split!r}')
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    name = str(corpus)
    if name == "grammar":
        first = 0 if split == "train" else 10**9
        made = grammar.stories(n or GRAMMAR_STORIES, seed=seed, first=first)
        ids = first + np.arange(len(made))
        return StoryData([story.text for story in made], ids, split, name)
    if name == "embedded":
        texts, whole = read_stories(data_folder() / "stories/held-out.txt.xz"), True
    elif Path(corpus).exists():
        texts, whole = _of_path(Path(corpus), split)
    elif isinstance(corpus, Path) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(f"no file or folder {name}; {_ALTERNATIVE}")
    else:
        texts, whole = _of_hub(name, split, n), False
    ids = np.arange(len(texts))
    if whole:
        mine = [_is_test(text) == (split == "test") for text in texts]
        ids = ids[np.array(mine, bool)]
    ids = ids[:n]
    return StoryData([texts[i] for i in ids], ids, split, name)


def read_stories(path: str | Path) -> list[str]:
    """The stories of one file, in order; its name says the format (see `stories`)."""
    path = Path(path)
    kind = [s for s in path.suffixes if s not in _OPENERS][-1:] or [""]
    try:
        if kind == [".parquet"]:
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path, columns=["text"])[
                "text"
            ].to_pylist()
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            content = file.read()
        if kind == [".jsonl"]:
            return [json.loads(line)["text"] for line in content.splitlines() if line]
    except (
        EOFError,
        gzip.BadGzipFile,
        lzma.LZMAError,
        zlib.error,
        ValueError,
    ) as error:
        raise ValueError(
            f"{path} cannot be read as {kind[0] or 'text'} ({error}); get it again "
            "from where it came (the embedded text: `git checkout -- data/stories`)"
        ) from error
    except KeyError as error:
        raise ValueError(
            f"{path} has no column {error}: stories stand in `text`"
        ) from error
    return [story for part in content.split(f"{END}\n") if (story := part.strip())]


def _of_path(path: Path, split: str) -> tuple[list[str], bool]:
    """Texts, and whether they are still to be split."""
    if path.is_file():
        return read_stories(path), True
    kinds = (".txt", ".jsonl", ".parquet")
    files = [
        file
        for file in sorted(path.rglob("*"))
        if any(kind in file.suffixes for kind in kinds)
    ]
    if not files:
        raise ValueError(f"no .txt, .jsonl or .parquet file in {path}")
    by_split = {
        which: [f for f in files if any(p in f.stem.lower() for p in prefixes)]
        for which, prefixes in _SPLITS.items()
    }
    whole = not all(by_split.values())
    chosen = files if whole else by_split[split]
    return [text for file in chosen for text in read_stories(file)], whole


def _of_hub(name: str, split: str, n: int | None) -> list[str]:
    """Texts of a dataset on the hub; streamed when only the first n are wanted."""
    import datasets

    wanted = "train" if split == "train" else "validation"
    try:
        rows = datasets.load_dataset(name, split=wanted, streaming=n is not None)
        return [row["text"] for row in (rows if n is None else rows.take(n))]
    except (OSError, ValueError, RuntimeError) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise ConnectionError(
            f"the dataset {name!r} ({wanted}) cannot be had from the hub "
            f"({why}). {_ALTERNATIVE}; or give the path of a file or folder"
        ) from error


def _is_test(text: str) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:4], "big") < TEST_SHARE * 2**32


def shuffled_words(data: StoryData, seed: int = 0) -> StoryData:
    """The same words, each story's in an order without sense: a null for context."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.permutation(text.split())) for text in data.texts]
    return StoryData(texts, data.ids, data.split, f"{data.name}, shuffled words")


class Tokens(NamedTuple):
    """Token ids, one row a story or one row a stretch of several (`packed`)."""

    ids: Int64[np.ndarray, "n context"]
    """Each row starts with the BOS token, unless packed; padded at the end."""
    documents: Int64[np.ndarray, " n"]
    """Id of the story in which the row begins."""
    spans: list[list[tuple[int, int]]]
    """Where each token of a row stands in its story; (0, 0) for BOS and padding."""


def tokens(
    data: StoryData, tokenizer: Any, context: int = 256, *, packed: bool = False
) -> Tokens:
    """The stories as the token ids that a model takes.

    Args:
        tokenizer: a fast tokenizer of transformers, with a BOS or EOS token; padding
            is its pad token, else that same token.
        context: positions a row. A longer story is cut, a shorter one padded.
        packed: instead, stories one after another, each begun by BOS, are cut into
            full rows; the remainder is left out. No padding, and no `spans`.

    Raises ValueError when context < 2, the tokenizer has neither token, or packed text
    is shorter than one row.
    """
    bos = next(
        (t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None),
        None,
    )
    if bos is None:
        raise ValueError(
            "the tokenizer has no BOS and no EOS token to begin a text with"
        )
    if context < 2:
        raise ValueError(f"context {context}: expected 2 positions or more")
    coded = tokenizer(
        data.texts, add_special_tokens=False, return_offsets_mapping=not packed
    )
    if packed:
        stream = [np.array([bos, *row]) for row in coded["input_ids"]]
        lengths = np.array([len(row) for row in stream])
        n = int(lengths.sum()) // context
        if n == 0:
            raise ValueError(
                f"{len(data)} stories of {lengths.sum()} tokens in all are shorter "
                f"than the context of {context}: give more text or a smaller context"
            )
        rows = np.concatenate(stream)[: n * context].reshape(n, context)
        starts = np.searchsorted(lengths.cumsum(), np.arange(n) * context, "right")
        return Tokens(rows.astype(np.int64), data.ids[starts], [])
    pad = bos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = np.full((len(data), context), pad, np.int64)
    rows[:, 0] = bos
    spans = []
    for row, ids, places in zip(
        rows, coded["input_ids"], coded["offset_mapping"], strict=True
    ):
        ids, places = ids[: context - 1], places[: context - 1]
        row[1 : len(ids) + 1] = ids
        spans.append([(0, 0), *places, *[(0, 0)] * (context - 1 - len(ids))])
    return Tokens(rows, data.ids, spans)
