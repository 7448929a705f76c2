"""The demo's data: which definitions are suitable, and that train and test sets never overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo_assets import dataset, wordnet
from demo_assets.wordnet import Definition

INDEX = (
    "  1 This software and database is being provided to you",
    "lighthouse n 1 4 @ #p %p ~ 1 1 03670849  ",
    "new_york n 1 1 @ 1 1 09119277  ",
    "obscureword n 1 1 @ 1 0 00000001  ",
    "insult n 1 1 @ 1 1 00000002  ",
    "tower n 1 1 @ 1 1 00000003  ",
)
DATA = (
    "  1 This software and database is being provided to you",
    '03670849 06 n 01 lighthouse 0 001 @ 1 n 0000 | (navigation) a tower with a light; "see the lighthouse"  ',
    "00000002 18 n 01 insult 0 001 @ 1 n 0000 | a person of whom one speaks ill  ",
    "00000003 06 n 01 tower 0 001 @ 1 n 0000 | a high tower made of stone  ",
    "00000004 06 n 01 stub 0 001 @ 1 n 0000 | too short here  ",
)


def test_a_definition_is_the_first_meaning_without_label_and_example() -> None:
    assert wordnet.glosses(DATA)["03670849"] == "a tower with a light"


def test_persons_and_short_definitions_are_left_out() -> None:
    assert set(wordnet.glosses(DATA)) == {"03670849", "00000003"}


def test_only_single_words_that_real_text_contains_are_used() -> None:
    assert [word for word, _ in wordnet.first_senses(INDEX)] == ["lighthouse", "insult", "tower"]


def test_a_definition_that_uses_its_own_word_is_left_out() -> None:
    assert wordnet.definitions(INDEX, DATA) == [Definition("lighthouse", "a tower with a light")]


def test_no_word_and_no_gloss_appears_twice() -> None:
    every = [Definition(f"word{number % 7}", f"gloss {number % 5}") for number in range(35)]
    parts = wordnet.split(every, {"train": 3, "test": 2})
    chosen = [definition for part in parts.values() for definition in part]
    assert len({each.word for each in chosen}) == len({each.gloss for each in chosen}) == 5


def test_too_few_definitions_are_refused_with_their_number() -> None:
    with pytest.raises(ValueError, match="1 different definitions, but 2 are needed"):
        wordnet.split([Definition("a", "b")], {"train": 2})


def test_the_order_does_not_depend_on_the_order_of_the_source() -> None:
    every = [Definition(f"word{number}", f"gloss {number}") for number in range(20)]
    assert wordnet.split(every, {"train": 20}) == wordnet.split(reversed(every), {"train": 20})


def test_the_real_data_has_1200_and_120_pairs_without_a_leak() -> None:
    folder = dataset.folder()
    parts = {name: _pairs(folder / f"{name}.jsonl") for name in ("train", "test")}
    assert {name: len(pairs) for name, pairs in parts.items()} == {"train": 1200, "test": 120}
    for column in (0, 1):
        every = [pair[column] for pairs in parts.values() for pair in pairs]
        assert len(set(every)) == len(every)
    assert all(prompt.startswith("Define the noun: ") for prompt, _ in parts["train"])
    assert "Princeton" in (folder / "LICENSE").read_text()


def _pairs(path: Path) -> list[tuple[str, str]]:
    return [(row["prompt"], row["completion"]) for row in map(json.loads, path.read_text().splitlines())]
