"""The words of the questions and answers, one token each, and the layout of a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

LOCATIONS: Final = 32

DIGITS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: Final = ("red", "green", "blue", "yellow", "purple", "white")
TEXTURES: Final = ("plain", "stripes", "bars", "checks", "dots")
EXTREMES: Final = ("leftmost", "rightmost", "top", "bottom")
OPERATORS: Final = ("plus", "minus")
GRAMMAR: Final = (
    *("where", "is", "the", "digit", "coloured", "like", "what", "colour", "there", "a"),
    *("how", "many", "digits", "background", "?", "yes", "no", "user", "assistant", ":"),
)
SPECIAL: Final = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
LOCATION_WORDS: Final = tuple(f"<{i}>" for i in range(LOCATIONS))

WORDS: Final = (
    *SPECIAL,
    *LOCATION_WORDS,
    *DIGITS,
    *COLOURS,
    *TEXTURES,
    *EXTREMES,
    *OPERATORS,
    *GRAMMAR,
)
TOKENS: Final[dict[str, int]] = {word: token for token, word in enumerate(WORDS)}
PAD, BOS, EOS, UNKNOWN, IMAGE = range(len(SPECIAL))
FIRST_LOCATION: Final = TOKENS["<0>"]

# Words that say which digit is meant; the training curriculum may move them to the end.
QUERY_WORDS: Final = frozenset((*DIGITS, *COLOURS, *EXTREMES, *OPERATORS))


def tokens(words: Iterable[str]) -> list[int]:
    """Token ids of words that are all in the vocabulary."""
    return [TOKENS[word] for word in words]


def text(ids: Iterable[int]) -> str:
    """Words of token ids, separated by spaces."""
    return " ".join(WORDS[token] for token in ids)


# A prompt is PREFIX, one IMAGE token per patch, the question's words, SUFFIX.
PREFIX: Final[Sequence[int]] = (BOS, *tokens(("user", ":")))
SUFFIX: Final[Sequence[int]] = tuple(tokens(("assistant", ":")))


def prompt(question: str) -> list[int]:
    """Token ids that follow the image: the question and the start of the answer."""
    return [*tokens(question.split()), *SUFFIX]


def prompt_query_last(question: str) -> list[int]:
    """As `prompt`, with the query words moved behind the suffix. Curriculum only."""
    words = question.split()
    query = [word for word in words if word in QUERY_WORDS]
    rest = [word for word in words if word not in QUERY_WORDS]
    return [*tokens(rest), *SUFFIX, *tokens(query)]
