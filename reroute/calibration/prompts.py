"""Prompts as a processor returns them, one by one and in batches."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import shown
from ..errors import RerouteError

__all__ = ["Prompt", "Prompts", "batches", "check_number", "collate"]

FEWEST = 4
"""Prompts with which anything can be chosen on one half and compared on the other."""
ENOUGH = 100
"""Prompts below which a choice is a matter of luck."""
COMPUTED = ("labels", "position_ids", "past_key_values", "cache", "inputs_embeds")
"""What a call may have, and a prompt may not."""


@dataclass(frozen=True)
class Prompt:
    """One prompt on the CPU. ``tokens``: inputs of shape (1, L), with ids and mask; ``others``: pictures and so on.

    ``visual``: its number of visual tokens N.
    """

    tokens: Mapping[str, Tensor]
    others: Mapping[str, Any]
    visual: int

    def __len__(self) -> int:
        """Its number of tokens L."""
        return self.tokens["input_ids"].shape[1]

    @property
    def kind(self) -> Any:
        """Equal for prompts whose pictures can be put one after the other, to be called in one batch."""
        shapes = ((name, x.dtype, x.shape[1:]) for name, x in self.others.items() if isinstance(x, Tensor))
        alone = [] if all(isinstance(x, Tensor) and x.ndim for x in self.others.values()) else [id(self)]
        return (*sorted(self.tokens), *sorted(shapes, key=str), *alone)


@dataclass(frozen=True)
class Prompts:
    """All prompts. ``digest`` tells them from others; ``warnings`` says why they may not be the right ones."""

    all: tuple[Prompt, ...]
    digest: str
    warnings: tuple[str, ...]

    @classmethod
    def read(cls, given: Iterable[Mapping[str, Any]], visual_ids: Sequence[int]) -> Prompts:
        """Check what ``calibrate`` was given.

        Raises:
            RerouteError: a prompt is none, has no picture, or there are too few.
        """
        if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Iterable):
            raise RerouteError(
                f"prompts must be a list with the inputs of model.generate for each prompt, not {shown(given)}."
            )
        prompts = tuple(_checked(number, prompt, visual_ids) for number, prompt in enumerate(given, 1))
        check_number(len(prompts))
        texts = [tuple(i for i in p.tokens["input_ids"][0].tolist() if i not in visual_ids) for p in prompts]
        return cls(prompts, _digest(prompts), tuple(_doubts(texts)))


def check_number(prompts: int) -> None:
    """RerouteError if so many ``prompts`` are too few."""
    if prompts < FEWEST:
        raise RerouteError(
            f"{prompts} prompts are too few: half of them choose, the others judge. Give {ENOUGH} or more."
        )


def _checked(number: int, given: Any, visual_ids: Sequence[int]) -> Prompt:
    ids = given.get("input_ids") if isinstance(given, Mapping) else None
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        raise RerouteError(
            f"Prompt {number} is not what model.generate takes for one prompt: give what a processor returns with "
            'return_tensors="pt" and return_dict=True, input_ids (1, L) and all.'
        )
    wrong = [name for name in COMPUTED if given.get(name) is not None]
    if wrong:
        raise RerouteError(f"Prompt {number} has {', '.join(wrong)}: leave these out, they follow from the rest.")
    is_visual = torch.isin(ids, torch.tensor(visual_ids, device=ids.device))[0]
    if not is_visual.any() or is_visual[-1]:
        where = "ends in a picture" if is_visual.any() else "has no picture"
        raise RerouteError(f"Prompt {number} {where}, so no question could rank its visual tokens. Leave it out.")
    held = {name: x.detach().cpu() if isinstance(x, Tensor) else x for name, x in given.items() if x is not None}
    held.setdefault("attention_mask", torch.ones_like(held["input_ids"]))
    tokens = {name: x for name, x in held.items() if isinstance(x, Tensor) and x.shape == ids.shape}
    others = {name: x for name, x in held.items() if name not in tokens}
    return Prompt(tokens, others, int(is_visual.sum()))


def _digest(prompts: Sequence[Prompt]) -> str:
    found = hashlib.sha256()
    for prompt in prompts:
        for name, value in sorted({**prompt.tokens, **prompt.others}.items()):
            if isinstance(value, Tensor):
                found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
            else:
                found.update(f"{name} {value!r}".encode())
    return found.hexdigest()


def _doubts(texts: Sequence[tuple[int, ...]]) -> Iterable[str]:
    """What makes the prompts, of whose text ``texts`` are the tokens, poor representatives."""
    if len(texts) < ENOUGH:
        yield (
            f"{len(texts)} prompts are few: with 50 the schedule that is found depends much on which they are. Give "
            f"{ENOUGH} or more."
        )
    distinct = len(set(texts)) / len(texts)
    length, same = Counter(map(len, texts)).most_common(1)[0]
    if distinct < 0.1 or same > 0.5 * len(texts):
        yield (
            f"The prompts seem to be of one kind: {distinct:.0%} of their texts are distinct, and "
            f"{same / len(texts):.0%} have {length} tokens of text. What is found serves such questions, and may fail "
            "at others: give prompts of every kind that will be asked."
        )


def batches(prompts: Sequence[Prompt], max_tokens: int, extra: int = 0) -> list[list[int]]:
    """Indices of prompts that go into one call each, of at most ``max_tokens`` with padding and ``extra`` per prompt.

    Longer prompts go alone.
    """
    found: list[list[int]] = []
    order = sorted(range(len(prompts)), key=lambda i: (str(prompts[i].kind), len(prompts[i]), i))
    for index in order:
        prompt = prompts[index]
        rows = 1 + len(found[-1]) if found else 0
        fits = rows * (len(prompt) + extra) <= max_tokens  # sorted by length: this is the longest
        if found and fits and prompts[found[-1][0]].kind == prompt.kind:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def collate(prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], pad: int) -> dict[str, Any]:
    """Inputs of one call: each prompt with its answer behind it, padded on the left."""
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    called: dict[str, Any] = {}
    for name in prompts[0].tokens:
        rows = []
        for prompt, answer in zip(prompts, answers, strict=True):
            row, new = prompt.tokens[name][0], torch.tensor(answer, dtype=torch.long)
            if name != "input_ids":
                new = torch.ones_like(new) if name == "attention_mask" else torch.zeros_like(new)
            row = torch.cat([row, new.to(row.dtype)])
            rows.append(torch.nn.functional.pad(row, (length - len(row), 0), value=pad if name == "input_ids" else 0))
        called[name] = torch.stack(rows)
    for name, value in prompts[0].others.items():
        called[name] = (
            torch.cat([p.others[name] for p in prompts]) if isinstance(value, Tensor) and value.ndim else value
        )
    return called
