"""WordNet's files → prompt/completion pairs. Pure: text in, values out. Used by dataset.

The format is that of wndb(5WN): index.POS leads from a word to its senses, data.POS holds each sense's gloss.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

WORD = re.compile(r"^[a-z]{3,14}$")
GLOSS = re.compile(r"^[a-z][a-z ,'()-]*[a-z)]$")
LABEL = re.compile(r"^\([^)]*\)\s*")
SHORTEST, LONGEST = 4, 12  # words of a gloss
# lexnames(5WN) of things that one can point at: animals, artefacts, body, food, places, objects, phenomena, plants,
# amounts, shapes, substances, time. People, feelings and acts are left out: their glosses include insults.
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
    """(word, offset of its commonest sense) of each word that WordNet's own corpus contains.

    >>> list(first_senses(["dog n 7 5 @ ~ #m #p %p 7 1 02084071 10114209"]))
    [('dog', '02084071')]
    """
    for line in index:
        if line.startswith(" "):  # the licence
            continue
        fields = line.split()
        pointers = int(fields[3])
        tagged_senses, offset = int(fields[5 + pointers]), fields[6 + pointers]
        if tagged_senses and WORD.match(fields[0]):
            yield fields[0], offset


def glosses(data: Iterable[str], longest: int = LONGEST) -> dict[str, str]:
    """Offset of a thing's sense → its definition, without examples, second meanings and labels, where it is fit:
    at most `longest` words."""
    found: dict[str, str] = {}
    for line in data:
        if line.startswith(" "):
            continue
        synset, _, gloss = line.partition(" | ")
        offset, category, *_ = synset.split()
        meaning = LABEL.sub("", gloss.split(";")[0].strip())
        if category in THINGS and GLOSS.match(meaning) and SHORTEST <= len(meaning.split()) <= longest:
            found[offset] = meaning
    return found


def definitions(index: Iterable[str], data: Iterable[str], longest: int = LONGEST) -> list[Definition]:
    """Every noun that has a fit definition which does not use the word itself."""
    meaning = glosses(data, longest)
    return [
        Definition(word, meaning[offset])
        for word, offset in first_senses(index)
        if offset in meaning and word not in meaning[offset]
    ]


def split(every: Iterable[Definition], sizes: Mapping[str, int]) -> dict[str, list[Definition]]:
    """Disjoint lists of the given sizes, in an order that looks random and is the same for ever.

    No word and no gloss stands twice, in one list or in two. Raises ValueError where there are too few.
    """
    words: set[str] = set()
    meanings: set[str] = set()
    unique: list[Definition] = []
    for definition in sorted(every, key=_shuffled):
        if definition.word not in words and definition.gloss not in meanings:
            words.add(definition.word)
            meanings.add(definition.gloss)
            unique.append(definition)
    wanted = sum(sizes.values())
    if len(unique) < wanted:
        raise ValueError(f"{len(unique)} different definitions, {wanted} wanted: ask for fewer")
    parts: dict[str, list[Definition]] = {}
    for name, size in sizes.items():
        parts[name], unique = unique[:size], unique[size:]
    return parts


def _shuffled(definition: Definition) -> str:
    return hashlib.sha256(definition.word.encode()).hexdigest()
