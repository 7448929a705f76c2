"""The four data sets: real texts → prompt/completion rows. Pure; called by `data`. The same rows every time.

Prompts and completions are plain text that every system tokenises alike (a completion begins where a word does), so
the same tokens are learnt everywhere. Where a chat is meant, the model's own turn markers stand in the text.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

Length = Callable[[str], int]
"""Tokens of a text."""


@dataclass(frozen=True)
class Pair:
    """One row."""

    prompt: str
    completion: str

    def to_json(self) -> dict[str, str]:
        return {"prompt": self.prompt, "completion": self.completion}


@dataclass(frozen=True)
class Meaning:
    """A word and what WordNet says that it means."""

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
    """Entries cut so that lengths are log-normal with that median and mean; the first 30 % is the prompt.

    Nothing is prepended, so rows share no prefix.
    """
    spread = math.sqrt(2 * math.log(mean / median))
    grid = [(index + 0.5) / rows for index in range(rows)]
    wanted = [round(min(longest, max(8, median * math.exp(spread * NormalDist().inv_cdf(share))))) for share in grid]
    rising = sorted(((length(text), text) for text in texts), key=lambda each: (each[0], _shuffled(each[1])))
    chosen: list[Pair] = []
    for target in reversed(wanted):  # the longest first, from the shortest entry that is long enough
        index = next((i for i, (size, _) in enumerate(rising) if size >= target), len(rising) - 1)
        _, text = rising.pop(index)
        chosen.append(_parted(_cut(text, target - 1, length), 0.3))  # an end token follows
    return sorted(chosen, key=lambda pair: _shuffled(pair.prompt + pair.completion))


def short(meanings: Iterable[Meaning], rows: int) -> list[Pair]:
    """A question of a few words and its answer, between the model's turn markers."""
    chosen = sorted(meanings, key=lambda each: _shuffled(each.word))[:rows]
    return [
        Pair(_CHAT.format(question=_QUESTIONS[index % len(_QUESTIONS)].format(word=each.word)), each.gloss)
        for index, each in enumerate(chosen)
    ]


def long(texts: Sequence[str], length: Length, rows: int, *, shortest: int, longest: int) -> list[Pair]:
    """Neighbouring entries joined until a document is long enough; its first 5 % is the prompt."""
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
    return [_parted(text, 0.05) for text in chosen]


def shared(meanings: Iterable[Meaning], rows: int) -> list[Pair]:
    """The same instruction before every row."""
    chosen = sorted(meanings, key=lambda each: _shuffled(f"shared {each.word}"))[:rows]
    return [Pair(INSTRUCTION.format(word=each.word), f" {each.gloss}") for each in chosen]


def meanings(index: Iterable[str], data: Iterable[str], words: range) -> list[Meaning]:
    """WordNet's index.POS and data.POS (wndb(5WN)) → the commonest sense of each word that its own corpus contains.

    `words`: how many words a gloss may have. Examples and second meanings are left out.
    """
    glosses = {}
    for line in data:
        if not line.startswith(" "):
            synset, _, gloss = line.partition(" | ")
            phrase = re.sub(r"^\([^)]*\)\s*", "", gloss.split(";")[0].strip())
            if len(phrase.split()) in words and re.fullmatch(r"[a-z][a-z ,'()-]*", phrase):
                glosses[synset.split()[0]] = phrase
    found: dict[str, Meaning] = {}
    for line in index:
        if not line.startswith(" "):
            fields = line.split()
            pointers = int(fields[3])
            gloss = glosses.get(fields[6 + pointers])
            if int(fields[5 + pointers]) and gloss and re.fullmatch(r"[a-z]{3,14}", fields[0]):
                found.setdefault(gloss, Meaning(fields[0], gloss))
    return list(found.values())


def _cut(text: str, tokens: int, length: Length) -> str:
    """The longest beginning of whole words with at most so many tokens (at least four words)."""
    words = _WORDS.findall(text)
    low, high = min(4, len(words)), len(words)
    while low < high:
        middle = (low + high + 1) // 2
        if length("".join(words[:middle]).rstrip()) <= tokens:
            low = middle
        else:
            high = middle - 1
    return "".join(words[:low]).rstrip()


def _parted(text: str, share: float) -> Pair:
    """At a border of words; the completion begins with the space."""
    words = re.findall(r"\s*\S+", text)
    at = min(len(words) - 1, max(1, round(share * len(words))))
    return Pair("".join(words[:at]), "".join(words[at:]))


def _shuffled(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
