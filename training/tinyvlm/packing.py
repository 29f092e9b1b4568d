"""Batches for training: several questions packed behind one shared image.

A packed row is PREFIX, the image, then questions with their answers one after another. Each
question sees the image and itself, and its positions start right after the image, so it is
processed exactly as if it were alone: many answers for the price of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reroute.demo.tinyvlm import questions, scenes
from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.digits import Split
from reroute.demo.tinyvlm.questions import Question
from reroute.demo.tinyvlm.scenes import PATCHES, Scene

Ints = npt.NDArray[np.int64]

IMAGE_END: Final = len(vocab.PREFIX) + PATCHES
NO_LABEL: Final = -100

# What each label is for: an index into KIND_NAMES. "word" labels are explained in `word_label`.
KIND_NAMES: Final = (*questions.KINDS, "word")
WORD: Final = len(KIND_NAMES) - 1

# The questions asked of a scene, in this order, as far as it has them and the row has room.
MIXED: Final = (
    *("attr", "ext", "riddle", "col", "attr", "riddlecol", "cls", "ext", "riddle", "exist"),
    *("ext", "count", "bg", "attr", "col", "ext"),
)
PAIRED: Final = (
    *("hop", "hint", "hop", "hopcls", "hopext", "hop", "hint", "riddle", "col", "hop", "attr"),
    *("hopcls", "riddlecol", "hop", "hop", "hopcls"),
)


@dataclass(frozen=True)
class Mix:
    """What a batch holds; shares are between 0 and 1."""

    digits: tuple[int, int] = (5, 8)  # least and most digits of a scene
    paired: float = 0.5  # share of paired scenes
    query_last: float = 0.0  # share of the questions with the query words moved to the end
    hints: float = 0.0  # share of the hinted questions that keep their hint
    riddles: float = 1.0  # share of the riddles that are asked
    extremes: float = 1.0  # share of the two-hop questions through an extreme that are asked
    room: int = 128  # tokens for questions and answers in a row


@dataclass(frozen=True)
class Batch:
    """A packed batch of B rows of S tokens."""

    pixels: Tensor  # float32 (B, 3, 96, 96), normalised to [-1, 1]
    ids: Tensor  # int64 (B, S)
    segments: Tensor  # int64 (B, S): 0 image and prefix, 1... questions, -1 padding
    positions: Tensor  # int64 (B, S)
    labels: Tensor  # int64 (B, S): the next token, or NO_LABEL
    kinds: Tensor  # int64 (B, S): index into KIND_NAMES, -1 without label
    slots: Tensor  # int64 (B, S): which token of the answer a label is


def attention_mask(segments: Tensor) -> Tensor:
    """bool (B, 1, S, S), true where a query (third axis) may attend to a key.

    Every token sees earlier tokens of its own segment, questions also see the image. Padding
    sees itself, for a row without keys would be undefined.
    """
    size = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    seen = causal & ((query == key) | ((key == 0) & (query >= 0)))
    return (seen | torch.eye(size, dtype=torch.bool))[:, None]


def word_label(question: Question, scene: Scene) -> tuple[int, int] | None:
    """(index of a word of the question, token that is predicted there as an extra label).

    Where a lone word names exactly one digit, as "seven" may, the label is that digit's other
    attribute: its colour. Where a word completes a riddle, the label is the result. Both ask
    the prompt itself to hold what its words refer to, long before the answer.
    """
    words = question.text.split()
    query = [i for i, word in enumerate(words) if word in vocab.QUERY_WORDS]
    if question.kind.startswith("riddle") and question.target is not None:
        return query[-1], vocab.TOKENS[vocab.DIGITS[scene.digits[question.target].label]]
    if len(query) != 1:
        return None
    word = words[query[0]]
    names = [(vocab.DIGITS[d.label], vocab.COLOURS[d.colour]) for d in scene.digits]
    named = [pair for pair in names if word in pair]
    if len(named) != 1:
        return None
    label, colour = named[0]
    return query[0], vocab.TOKENS[colour if word == label else label]


def choose(rng: np.random.Generator, scene: Scene, paired: bool, mix: Mix) -> list[Question]:
    """The questions asked of a scene, no text twice."""
    chosen: list[Question] = []
    keep = {"riddle": mix.riddles, "riddlecol": mix.riddles, "hopext": mix.extremes, "bg": 0.5}
    pool: dict[str, list[Question]] = {}
    for kind in PAIRED if paired else MIXED:
        if kind == "hint" and rng.random() >= mix.hints:
            kind = "hop"
        if rng.random() >= keep.get(kind, 1.0):
            continue
        if kind not in pool:
            pool[kind] = questions.ask(scene, kind, rng)
        if pool[kind]:
            chosen.append(pool[kind].pop(int(rng.integers(len(pool[kind])))))
    return chosen


class _Row:
    """Fills one row of a batch, question by question."""

    def __init__(self, arrays: dict[str, Ints], row: int) -> None:
        self.arrays = {name: array[row] for name, array in arrays.items()}
        self.arrays["ids"][:IMAGE_END] = [*vocab.PREFIX, *[vocab.IMAGE] * PATCHES]
        self.arrays["segments"][:IMAGE_END] = 0
        self.arrays["positions"][:IMAGE_END] = np.arange(IMAGE_END)
        self.end, self.segment = IMAGE_END, 1

    def add(self, question: Question, prompt: list[int], extra: tuple[int, int] | None) -> None:
        """Append a question if it fits. `extra` is (offset in the prompt, token): a word label."""
        answer = [*vocab.tokens(question.answer), vocab.EOS]
        length = len(prompt) + len(answer) - 1
        start, stop = self.end, self.end + length
        if stop > len(self.arrays["ids"]):
            return
        self.arrays["ids"][start:stop] = (prompt + answer)[:-1]
        self.arrays["segments"][start:stop] = self.segment
        self.arrays["positions"][start:stop] = IMAGE_END + np.arange(length)
        self._label(slice(stop - len(answer), stop), answer, KIND_NAMES.index(question.kind))
        if extra is not None:
            offset, token = extra
            self._label(slice(start + offset, start + offset + 1), [token], WORD)
        self.end, self.segment = stop, self.segment + 1

    def _label(self, where: slice, tokens: list[int], kind: int) -> None:
        self.arrays["labels"][where] = tokens
        self.arrays["kinds"][where] = kind
        self.arrays["slots"][where] = np.arange(len(tokens))


def make_batch(rng: np.random.Generator, size: int, split: Split, mix: Mix) -> Batch:
    """Draw scenes and questions; everything follows from the generator's state."""
    shape = (size, IMAGE_END + mix.room)
    empty = {"ids": vocab.PAD, "segments": -1, "positions": 0}
    empty |= {"labels": NO_LABEL, "kinds": -1, "slots": -1}
    arrays = {name: np.full(shape, value, np.int64) for name, value in empty.items()}
    drawn: list[Scene] = []
    for index in range(size):
        scene, paired = draw_scene(rng, split, mix)
        drawn.append(scene)
        row = _Row(arrays, index)
        for question in choose(rng, scene, paired, mix):
            last = bool(rng.random() < mix.query_last)
            prompt = (vocab.prompt_query_last if last else vocab.prompt)(question.text)
            row.add(question, prompt, None if last else word_label(question, scene))
    packed = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(pixels=pixels_of(drawn), **packed)


def draw_scene(rng: np.random.Generator, split: Split, mix: Mix) -> tuple[Scene, bool]:
    """A scene, and whether it is a paired one."""
    paired = bool(rng.random() < mix.paired)
    return scenes.draw(rng, split, mix.digits, paired), paired


def pixels_of(drawn: Sequence[Scene]) -> Tensor:
    """Pixels of scenes, normalised to [-1, 1], float32 (B, 3, 96, 96)."""
    pixels = torch.from_numpy(np.stack([scene.pixels for scene in drawn]))
    return (pixels.permute(0, 3, 1, 2) - 0.5) / 0.5
