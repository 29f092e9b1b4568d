"""What an interrupted calibration leaves behind, to go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import RerouteError
from ..files import write_text
from ..held import held_by
from .proposal import Proposal
from .search import Evaluation

__all__ = ["State", "digest_of"]

VERSION = 2
"""Of the file."""
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class State:
    """The file ``path`` of one calibration; without a path nothing is kept. ``about``: what must be the same again."""

    path: Path | None
    about: Mapping[str, Any]

    @classmethod
    def beside(cls, out: Path | None, about: Mapping[str, Any]) -> State:
        """The state of the calibration that will write ``out``."""
        return cls(None if out is None else out.with_name(f"{out.name}.state"), about)

    def read(self) -> tuple[list[list[int]] | None, list[Evaluation]]:
        """The answers, if they are known, and the evaluations so far.

        Raises:
            RerouteError: the file belongs to another calibration, or is damaged.
        """
        if self.path is None or not self.path.exists():
            return None, []
        remedy = f"Delete {self.path} to begin anew, or write to another file."
        try:
            written = json.loads(self.path.read_text(encoding="utf-8"))
            version, about = written["version"], written["about"]
            answers, history = written["answers"], [_read(entry) for entry in written["evaluations"]]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise RerouteError(
                f"{self.path} cannot be read as the state of a calibration ({error}). {remedy}"
            ) from None
        wanted = {"version": VERSION, **self.about}
        other = [name for name, value in wanted.items() if {"version": version, **about}.get(name) != value]
        if other:
            raise RerouteError(
                f"{self.path} is of a calibration that was interrupted and had another {', another '.join(other)}. "
                f"{remedy}"
            )
        return answers, history

    def write(self, answers: Sequence[Sequence[int]], history: Sequence[Evaluation]) -> None:
        """Keep ``answers`` and ``history``. RerouteError if the file cannot be written."""
        if self.path is None:
            return
        entries = [{"steps": e.proposal.written(), "divergences": e.divergences} for e in history]
        state = {"version": VERSION, "about": self.about, "answers": answers, "evaluations": entries}
        write_text(self.path, json.dumps(state))

    def remove(self) -> None:
        """The calibration is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _read(entry: Mapping[str, Any]) -> Evaluation:
    return Evaluation(Proposal.read(entry["steps"]), tuple(map(float, entry["divergences"])))


def digest_of(model: Any) -> str:
    """Tells a model from others: names, shapes and a checksum of each of its weights."""
    found = hashlib.sha256(type(model).__name__.encode())
    for name, weight in model.named_parameters():
        for held in held_by(weight.detach()):
            bits = held.contiguous().view(_BITS[held.element_size()])
            checksum = None if bits.is_meta else int(bits.sum(dtype=torch.int64))  # of integers: the order adds nothing
            found.update(f"{name} {held.dtype} {tuple(held.shape)} {checksum}".encode())
    return found.hexdigest()
