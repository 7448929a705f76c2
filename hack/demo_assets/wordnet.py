"""Converts WordNet's files into prompt/completion pairs. Pure.

The format is described in wndb(5WN): index.POS maps a word to its senses, and data.POS has the
gloss of each sense.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

WORD = re.compile(r"^[a-z]{3,14}$")
GLOSS = re.compile(r"^[a-z][a-z ,'()-]*[a-z)]$")
LABEL = re.compile(r"^\([^)]*\)\s*")
SHORTEST, LONGEST = 4, 12  # number of words of a gloss
# lexnames(5WN) of concrete nouns: animals, artifacts, body, food, places, objects, phenomena,
# plants, amounts, shapes, substances, time. People, feelings and acts are left out, since their
# glosses include insults.
THINGS = frozenset({"05", "06", "08", "13", "15", "17", "19", "20", "23", "25", "27", "28"})


@dataclass(frozen=True)
class Definition:
    """A noun and what it means."""

    word: str
    gloss: str

    @property
    def prompt(self) -> str:
        return f"Define the noun: {self.word}"


def first_senses(index: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (word, offset of its most common sense) for each word in WordNet's tagged corpus.

    >>> list(first_senses(["dog n 7 5 @ ~ #m #p %p 7 1 02084071 10114209"]))
    [('dog', '02084071')]
    """
    for line in index:
        if line.startswith(" "):  # the license
            continue
        fields = line.split()
        pointers = int(fields[3])
        tagged_senses, offset = int(fields[5 + pointers]), fields[6 + pointers]
        if tagged_senses and WORD.match(fields[0]):
            yield fields[0], offset


def glosses(data: Iterable[str], longest: int = LONGEST) -> dict[str, str]:
    """Returns the definitions of concrete nouns by the offset of their sense.

    They have at most `longest` words, and no examples, second meanings or labels.
    """
    by_offset: dict[str, str] = {}
    for line in data:
        if line.startswith(" "):
            continue
        synset, _, gloss = line.partition(" | ")
        offset, category, *_ = synset.split()
        meaning = LABEL.sub("", gloss.split(";")[0].strip())
        if category in THINGS and GLOSS.match(meaning) and SHORTEST <= len(meaning.split()) <= longest:
            by_offset[offset] = meaning
    return by_offset


def definitions(index: Iterable[str], data: Iterable[str], longest: int = LONGEST) -> list[Definition]:
    """Returns every noun with a usable definition that doesn't contain the noun itself."""
    meaning = glosses(data, longest)
    return [
        Definition(word, meaning[offset])
        for word, offset in first_senses(index)
        if offset in meaning and word not in meaning[offset]
    ]


def split(definitions: Iterable[Definition], sizes: Mapping[str, int]) -> dict[str, list[Definition]]:
    """Returns disjoint lists of these sizes, in a pseudo-random order that never changes.

    No word and no gloss occurs twice, within a list or across lists. Raises ValueError if there
    are too few.
    """
    used_words: set[str] = set()
    meanings: set[str] = set()
    unique: list[Definition] = []
    for definition in sorted(definitions, key=_shuffled):
        if definition.word not in used_words and definition.gloss not in meanings:
            used_words.add(definition.word)
            meanings.add(definition.gloss)
            unique.append(definition)
    needed = sum(sizes.values())
    if len(unique) < needed:
        raise ValueError(f"{len(unique)} different definitions, but {needed} are needed: reduce the sizes")
    parts: dict[str, list[Definition]] = {}
    for name, size in sizes.items():
        parts[name], unique = unique[:size], unique[size:]
    return parts


def _shuffled(definition: Definition) -> str:
    return hashlib.sha256(definition.word.encode()).hexdigest()
