"""Makes prompt/completion rows of four data sets from real texts, the same every time. Pure.

Prompts and completions are plain text that every system tokenizes in the same way (a completion
begins with a word), so all systems are trained on the same tokens. Rows of chats contain the
model's own turn markers.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

Length = Callable[[str], int]
"""A function that returns the number of tokens of a text."""


@dataclass(frozen=True)
class Pair:
    """A row of a data set."""

    prompt: str
    completion: str

    def to_json(self) -> dict[str, str]:
        """Returns the row as it is written to JSONL."""
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Meaning:
    """A word and its definition in WordNet."""

    word: str
    gloss: str


INSTRUCTION = """\
You are the assistant of a publishing house that makes a concise dictionary for learners of English. For every noun \
that an editor sends, write the definition that will be printed beside it.

Follow these rules without exception:
1. Define the commonest sense of the noun only. Rare, technical and obsolete senses belong in other volumes.
2. Write a single phrase, not a sentence: begin with a lower-case letter, and put no full stop at its end.
3. Never use the noun itself, nor a word derived from it. A reader who doesn't know the word must understand you.
4. Prefer a broader term that the reader surely knows, followed by what sets this thing apart from others of its kind.
5. Give neither examples nor synonyms, neither pronunciation nor etymology, and no remarks about usage.
6. Keep to at most thirty words. When in doubt leave something out.
7. Treat people, nations and beliefs with respect. Where a usual definition is unkind, find a neutral one.
8. Use British spelling throughout, write numbers up to twelve as words.

Editors paste your answer into the page as it is. So reply with the definition alone: no greeting, no quotation marks, \
no explanation of your choice, and no question to the editor, even if the noun could be read in several ways.

Noun: {word}
Definition:"""

_QUESTIONS = (
    "What is meant by {word}?",
    "Define {word}.",
    "{word}: what does it mean?",
    "Tell me what {word} means.",
    "How would you explain {word} to a child?",
    "I have read the word {word}. What is that?",
    "Meaning of {word}, please?",
    "In a phrase, {word} is",
)
_CHAT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
_WORDS = re.compile(r"\S+\s*")


def mixed(texts: Iterable[str], length: Length, rows: int, *, median: int, mean: int, longest: int) -> list[Pair]:
    """Returns entries truncated so that their lengths are log-normal with that median and mean.

    The first 30 % of a text are the prompt. Nothing is prepended, so rows share no prefix.
    """
    spread = math.sqrt(2 * math.log(mean / median))
    grid = [(index + 0.5) / rows for index in range(rows)]
    lengths = [round(min(longest, max(8, median * math.exp(spread * NormalDist().inv_cdf(share))))) for share in grid]
    by_length = sorted(((length(text), text) for text in texts), key=lambda entry: (entry[0], _shuffled(entry[1])))
    chosen: list[Pair] = []
    for target in reversed(lengths):  # the longest first, from the shortest entry that is long enough
        index = next((i for i, (size, _) in enumerate(by_length) if size >= target), len(by_length) - 1)
        _, text = by_length.pop(index)
        chosen.append(_split(_cut(text, target - 1, length), 0.3))  # an end token follows
    return sorted(chosen, key=lambda pair: _shuffled(pair.prompt + pair.completion))


def short(meanings: Iterable[Meaning], rows: int) -> list[Pair]:
    """Returns short questions with their answers, between the model's turn markers."""
    chosen = sorted(meanings, key=lambda meaning: _shuffled(meaning.word))[:rows]
    return [
        Pair(_CHAT.format(question=_QUESTIONS[index % len(_QUESTIONS)].format(word=meaning.word)), meaning.gloss)
        for index, meaning in enumerate(chosen)
    ]


def long(texts: Sequence[str], length: Length, rows: int, *, shortest: int, longest: int) -> list[Pair]:
    """Returns documents of consecutive entries; the first 5 % of each are the prompt.

    They have between `shortest` and `longest` tokens.
    """
    documents: list[str] = []
    page: list[str] = []
    size = 0
    for text in texts:
        page.append(text)
        size += length(text) + 2
        if size >= shortest + 16:
            documents.append(_cut("\n\n".join(page), longest - 1, length))
            page, size = [], 0
    chosen = sorted(documents, key=_shuffled)[:rows]
    return [_split(text, 0.05) for text in chosen]


def shared(meanings: Iterable[Meaning], rows: int) -> list[Pair]:
    """Returns rows that all begin with the same instruction."""
    chosen = sorted(meanings, key=lambda meaning: _shuffled(f"shared {meaning.word}"))[:rows]
    return [Pair(INSTRUCTION.format(word=meaning.word), f" {meaning.gloss}") for meaning in chosen]


def meanings(index: Iterable[str], data: Iterable[str], count_range: range) -> list[Meaning]:
    """Returns the most common sense of each word in WordNet's tagged corpus.

    `index` and `data` are the lines of index.POS and data.POS (wndb(5WN)); a gloss has a number of
    words in `count_range`. Examples and second meanings are left out.
    """
    glosses = {}
    for line in data:
        if not line.startswith(" "):
            synset, _, gloss = line.partition(" | ")
            phrase = re.sub(r"^\([^)]*\)\s*", "", gloss.split(";")[0].strip())
            if len(phrase.split()) in count_range and re.fullmatch(r"[a-z][a-z ,'()-]*", phrase):
                glosses[synset.split()[0]] = phrase
    by_offset: dict[str, Meaning] = {}
    for line in index:
        if not line.startswith(" "):
            fields = line.split()
            pointers = int(fields[3])
            gloss = glosses.get(fields[6 + pointers])
            if int(fields[5 + pointers]) and gloss and re.fullmatch(r"[a-z]{3,14}", fields[0]):
                by_offset.setdefault(gloss, Meaning(fields[0], gloss))
    return list(by_offset.values())


def _cut(text: str, tokens: int, length: Length) -> str:
    """Returns the first complete words with at most `tokens` tokens, but at least four words."""
    parts = _WORDS.findall(text)
    low, high = min(4, len(parts)), len(parts)
    while low < high:
        middle = (low + high + 1) // 2
        if length("".join(parts[:middle]).rstrip()) <= tokens:
            low = middle
        else:
            high = middle - 1
    return "".join(parts[:low]).rstrip()


def _split(text: str, share: float) -> Pair:
    """Splits a text between two words; the completion begins with the space."""
    parts = re.findall(r"\s*\S+", text)
    at = min(len(parts) - 1, max(1, round(share * len(parts))))
    return Pair("".join(parts[:at]), "".join(parts[at:]))


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
