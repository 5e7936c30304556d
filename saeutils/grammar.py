"""Stories from a grammar, in which every word knows which concepts it carries.

Sampled text cannot say which token is a sad word, a plural or a reference to the hero;
here the generator knows. A story has a cast (hero A, friend B of the other gender, a
thing O, an elder P), a plot, and sentences out of `story_rules` filled with `words`.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from saeutils import words
from saeutils.story_rules import PLOTS, RULES

_VOWEL = re.compile(r"(?!uni|use|one|eu)[aeiou]|hour|honest", re.IGNORECASE)
_PIECE = re.compile(r"\[([^\]]+)\]|\{([^}]+)\}|([A-Za-z]+(?:'[a-z]+)?)|([.,!?;:\"¶])")
_FORMS = {  # of the third person, by gender
    "f": dict(he="she", him="her", his="her", self="herself"),
    "m": dict(he="he", him="him", his="his", self="himself"),
}
_GROUP = ("they", "them", "their")
_FIRST = ("I", "me", "my", "mine", "myself", "we")
_SUBJECT = ("he", "they", "I", "we")
_EITHER = ("it", "you")  # their form does not say whether they are the subject
_OWN = ("his", "their", "my", "mine", "your")


class Word(NamedTuple):
    """A word or punctuation mark of a story, story.text[start:stop]."""

    text: str
    start: int
    stop: int
    concepts: frozenset[str]
    entity: str
    """Whom it names or refers to: "A", "B", "O", "P", "G" (A and B), or ""."""


class Entity(NamedTuple):
    """Somebody or something in the cast."""

    name: str
    kind: str
    gender: str
    """f, m, or n for a thing."""


class LabelledStory(NamedTuple):
    """A story with what the generator knows about it."""

    text: str
    words: list[Word]
    cast: dict[str, Entity]
    plot: str


def stories(n: int, *, seed: int = 0, first: int = 0) -> list[LabelledStory]:
    """Stories number `first` to `first + n − 1` of the corpus `seed`, all distinct.

    Each depends on seed and number alone. Raises ValueError for n < 1 or first < 0.
    """
    if n < 1 or first < 0:
        raise ValueError(f"n {n} and first {first}: expected n ≥ 1 and first ≥ 0")
    return [story(seed, i) for i in range(first, first + n)]


def story(seed: int = 0, number: int = 0) -> LabelledStory:
    """Story `number` of the corpus `seed`."""
    rng = random.Random(f"{seed} {number}")
    girl, boy = (rng.choice(_LISTS[f"{g} name"])[0] for g in ("girl", "boy"))
    heroes = [Entity(girl, "girl", "f"), Entity(boy, "boy", "m")]
    rng.shuffle(heroes)
    for i, hero in enumerate(heroes):
        if rng.random() < 0.3:
            heroes[i] = hero._replace(kind=rng.choice(_LISTS["animal"])[0])
    elder = rng.choice(_LISTS["family"])[0]
    cast = {
        "A": heroes[0],
        "B": heroes[1],
        "O": Entity(*(rng.choice(_LISTS["toy"])[0],) * 2, "n"),
        "P": Entity(elder, elder, "f" if elder in ("mom", "grandma", "aunt") else "m"),
    }
    plot = rng.choice(list(PLOTS))
    writer = _Writer(rng, cast)
    writer.expand(PLOTS[plot], {})
    return LabelledStory("".join(writer.text), writer.words, cast, plot)


def concepts() -> list[str]:
    """All concepts that a word can carry, in a fixed order."""
    known = {c for _, labels in _all_words() for c in labels} | set(words.GROUPS)
    verbs = {f"{form} verb" for form in ("base", "past", "-ing", "-s")}
    nouns = {"singular noun", "plural noun"}
    pronouns = {f"{x} pronoun" for x in ("female", "male", "neuter", "plural")}
    parts = {"subject pronoun", "object pronoun", "possessive pronoun"}
    rest = {"pronoun", "first person", "second person", "dialogue", "punctuation"}
    return sorted(known | verbs | nouns | pronouns | parts | rest)


def token_concepts(
    story: LabelledStory, offsets: Sequence[tuple[int, int]], names: Sequence[str]
) -> Bool[np.ndarray, "tokens concepts"]:
    """Which tokens carry which of the concepts `names`.

    offsets: where each token starts and stops in story.text, as a fast tokenizer
        gives them (`return_offsets_mapping=True`). A token carries the concepts of
        every word that it shares a character with; blanks belong to no word.

    Raises ValueError for concepts that the grammar does not have.
    """
    if unknown := sorted(set(names) - set(concepts())):
        raise ValueError(f"no such concept: {unknown}; there are {concepts()}")
    column = {name: i for i, name in enumerate(names)}
    carried = np.zeros((len(offsets), len(names)), bool)
    owner = np.full(len(story.text) + 1, -1)
    for i, word in enumerate(story.words):
        owner[word.start : word.stop] = i
    for row, (start, stop) in enumerate(offsets):
        for i in set(owner[start:stop].tolist()) - {-1}:
            for concept in story.words[i].concepts & column.keys():
                carried[row, column[concept]] = True
    return carried


class _Writer:
    """Turns templates into text and words."""

    def __init__(self, rng: random.Random, cast: dict[str, Entity]) -> None:
        self.rng, self.cast = rng, cast
        self.text: list[str] = []
        self.words: list[Word] = []
        self.kept: dict[str, tuple[str, frozenset[str]]] = {}
        self.length = 0
        self.quoted, self.capital, self.glued = False, True, True
        self.article: int | None = None  # place in `text` of an "a" just written
        self.last: dict[str, str] = {}

    def expand(self, template: str, roles: dict[str, str]) -> None:
        for rule, slot, word, mark in _pieces(template):
            if rule:
                name, _, arguments = rule.partition(":")
                inner = [roles.get(x, x) for x in arguments.split(",") if x]
                options = [t for t in _templates(name) if t != self.last.get(name)]
                self.last[name] = chosen = self.rng.choice(options or _templates(name))
                self.capital |= name[0].isupper()
                self.expand(chosen, dict(zip("XY", inner, strict=False)))
            elif slot:
                self.fill(slot, roles)
            elif word:
                self.write(word, _LITERALS.get(word.lower(), frozenset()))
            else:
                self.punctuate(mark)

    def fill(self, slot: str, roles: dict[str, str]) -> None:
        key, _, wanted = slot.rpartition("=")
        if ":" in wanted:
            form, concept = wanted.split(":")
            text, labels = self.rng.choice(_inflected(form, concept))
            if key:
                self.kept[key] = text, labels
            return self.write(text, labels)
        if wanted in self.kept:
            return self.write(*self.kept[wanted])
        role, _, what = wanted.partition(".")
        role = roles.get(role, role)
        if role == "G":
            return self.write(what, _pronoun(what, "plural"), role)
        entity = self.cast[role]
        if not what:
            return self.write(entity.name, _LABELS[role, entity.gender], role)
        if what == "kind":
            labels = _KINDS.get(entity.kind, frozenset({"person", "noun"}))
            return self.write(entity.kind, labels | {"singular noun"}, role)
        if what in _FORMS["f"]:
            text = _FORMS[entity.gender][what]
            gender = "female" if entity.gender == "f" else "male"
            return self.write(text, _pronoun(what, gender), role)
        gender = "neuter" if what == "it" else ""
        return self.write(what, _pronoun(what, gender), role)

    def write(self, text: str, labels: frozenset[str], entity: str = "") -> None:
        if self.capital:
            text = text[0].upper() + text[1:]
        if self.article is not None and _VOWEL.match(text):
            self.text[self.article] += "n"
            self.words[-1] = self.words[-1]._replace(
                text=self.words[-1].text + "n", stop=self.words[-1].stop + 1
            )
            self.length += 1
        if not self.glued:
            self._put(" ")
        self.article = len(self.text) if text in ("a", "A") else None
        self._put(text, labels, entity)
        self.capital = self.glued = False

    def punctuate(self, mark: str) -> None:
        self.article = None
        if mark == "¶":
            self._put("\n")
            self.glued = True
            return
        opens = mark == '"' and not self.quoted
        if opens and not self.glued:
            self._put(" ")
        self.quoted &= mark != '"'
        self._put(mark, frozenset({"punctuation"}))
        self.quoted |= opens
        self.glued = opens
        self.capital = opens if mark == '"' else mark in ".!?"

    def _put(
        self, text: str, labels: frozenset[str] | None = None, entity: str = ""
    ) -> None:
        if labels is not None:
            labels = labels | {"dialogue"} if self.quoted else labels
            stop = self.length + len(text)
            self.words.append(Word(text, self.length, stop, labels, entity))
        self.text.append(text)
        self.length += len(text)


# --- words and their forms ------------------------------------------------


def plural(noun: str) -> str:
    """The regular plural."""
    return noun + "s"


def past(verb: str) -> str:
    """The regular past tense."""
    if verb.endswith("e"):
        return verb + "d"
    return verb[:-1] + "ied" if _ends_in_y(verb) else verb + "ed"


def ing(verb: str) -> str:
    """The regular -ing form."""
    return verb[:-1] + "ing" if re.search(r"[^eo]e$", verb) else verb + "ing"


def third(verb: str) -> str:
    """What he or she does, of any verb."""
    if _ends_in_y(verb):
        return verb[:-1] + "ies"
    return verb + ("es" if re.search(r"(s|x|z|ch|sh|o)$", verb) else "s")


def _ends_in_y(verb: str) -> bool:
    return re.search(r"[^aeiou]y$", verb) is not None


def _read(text: str) -> list[tuple[str, ...]]:
    """One entry a word: it and its irregular forms."""
    return [tuple(entry.split("/")) for entry in text.split()]


_LISTS = {
    concept: _read(text)
    for source in (words.NAMES, words.NOUNS, words.ADJECTIVES, words.ADVERBS)
    for concept, text in source.items()
} | {c: _read(t) for c, t in (words.VERBS | words.OTHERS | words.FUNCTION).items()}


def _groups(concept: str) -> frozenset[str]:
    return frozenset({concept}).union(
        group for group, members in words.GROUPS.items() if concept in members
    )


@cache
def _inflected(form: str, concept: str) -> list[tuple[str, frozenset[str]]]:
    """Every word of a concept, or of a group of concepts, in one form, with labels."""
    if concept not in _LISTS:
        return [w for c in words.GROUPS[concept] for w in _inflected(form, c)]
    own, found = _groups(concept), []
    for entry in _LISTS[concept]:
        word = entry[0]
        if form in ("noun", "nouns"):
            number = "singular noun" if form == "noun" else "plural noun"
            text = word if form == "noun" else (*entry, plural(word))[1]
            found.append((text, own | {number}))
        elif form in ("past", "ing"):
            regular = (word, past(word), ing(word))
            text = (entry if len(entry) == 3 else regular)[1 if form == "past" else 2]
            label = "past verb" if form == "past" else "-ing verb"
            found.append((text, own | {label}))
        elif form == "s":
            found.append((third(word), own | {"-s verb"}))
        else:
            found.append((word, own | {"base verb"} if form == "base" else own))
    return found


_FORM_OF = (
    *(("noun", c) for c in words.NOUNS),
    *(("nouns", c) for c in words.NOUNS),
    *((form, c) for c in words.VERBS for form in ("base", "past", "ing", "s")),
    *(("adj", c) for c in (*words.NAMES, *words.ADJECTIVES, *words.ADVERBS)),
    *(("other", c) for c in (*words.OTHERS, *words.FUNCTION)),
)


def _all_words() -> Iterator[tuple[str, frozenset[str]]]:
    for form, concept in _FORM_OF:
        yield from _inflected(form, concept)


def _unambiguous() -> dict[str, frozenset[str]]:
    """Labels of words in the templates' own text: those with one meaning only."""
    meanings: dict[str, set[frozenset[str]]] = {}
    for text, labels in _all_words():
        meanings.setdefault(text.lower(), set()).add(labels)
    literal = {w: next(iter(m)) for w, m in meanings.items() if len(m) == 1}
    for concept in words.FUNCTION:
        literal |= {entry[0]: _groups(concept) for entry in _LISTS[concept]}
    return literal


_LITERALS = _unambiguous()
_KINDS = {
    "girl": frozenset({"person", "noun"}),
    **{entry[0]: _groups("animal") for entry in _LISTS["animal"]},
}
_LABELS = {
    **{(r, "f"): _groups("girl name") for r in "AB"},
    **{(r, "m"): _groups("boy name") for r in "AB"},
    **{("P", g): _groups("family") | {"singular noun"} for g in "fm"},
    ("O", "n"): _groups("toy") | {"singular noun"},
}


def _pronoun(what: str, gender: str) -> frozenset[str]:
    labels = {"pronoun"}
    if what in _SUBJECT:
        labels.add("subject pronoun")
    elif what in _OWN:
        labels.add("possessive pronoun")
    elif what not in _EITHER:
        labels.add("object pronoun")
    if what in _FIRST:
        labels.add("first person")
    elif what in ("you", "your"):
        labels.add("second person")
    else:
        labels.add(f"{gender} pronoun")
    return frozenset(labels)


@cache
def _pieces(template: str) -> list[tuple[str, str, str, str]]:
    return _PIECE.findall(template)


@cache
def _templates(rule: str) -> list[str]:
    return [line.strip() for line in RULES[rule].strip().splitlines()]
