"""A stand-in for a CUDA graph on the CPU: the operations of a run, each with its tensors, to be run again on the same
memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["Tape"]

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class _Step:
    """One operation. ``writes``: its outputs are memory that it was given or made; a view makes and writes none."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    writes: bool

    @property
    def inputs(self) -> list[Tensor]:
        return _tensors((self.args, self.kwargs))

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a graph has baked in: the operation, shapes, strides and dtypes, and every other argument."""
        return str(self.func), *tree_leaves(tree_map(_described, (self.args, self.kwargs)))


class Tape(TorchDispatchMode):
    """Records what runs under it. ``replay`` runs the same operations on the same tensors and nothing else.

    As in a graph, whatever the host did while it was recorded is not done again: a number that was read from a prompt
    stays what it was, and a tensor that was made outside is read where it lies (``external``).
    """

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self._steps: list[_Step] = []
        self._made: dict[int, Tensor] = {}
        self._external: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record."""
        out = func(*args, **(kwargs or {}))
        given = _tensors((args, kwargs or {}))
        for tensor in given:
            if _memory(tensor) not in self._made:
                self._external.setdefault(_memory(tensor), tensor)
        known = set(map(_memory, given))
        is_view = all(_memory(t) in known for t in _tensors(out)) and not func._schema.is_mutable
        self._made |= {_memory(t): t for t in _tensors(out) if _memory(t) not in known}
        self._steps.append(_Step(func, args, kwargs or {}, out, not is_view))
        return out

    @property
    def external(self) -> list[Tensor]:
        """What was made outside, a tensor of each memory."""
        return list(self._external.values())

    @property
    def signature(self) -> list[tuple[Any, ...]]:
        """All that is baked in, operation by operation. A graph serves two prompts only if theirs are equal."""
        return [step.signature for step in self._steps]

    def replay(self, results: Iterable[Tensor] = ()) -> None:
        """Run it again. The memory of what it made is poisoned before, and after its last use, but for ``results``:
        a graph gives it to others then.
        """
        kept = set(map(_memory, results))
        last: dict[int, int] = {}
        for index, step in enumerate(self._steps):
            last |= {_memory(t): index for t in (*step.inputs, *_tensors(step.out))}
        ends: dict[int, list[Tensor]] = {}
        for memory, use in last.items():
            if memory in self._made and memory not in kept:
                ends.setdefault(use, []).append(self._made[memory])
        for tensor in self._made.values():
            _poison(tensor)
        for index, step in enumerate(self._steps):
            if step.writes and step.func.overloadpacket.__name__ not in _ALLOCATIONS:
                new = step.func(*step.args, **step.kwargs)
                for old, value in zip(_tensors(step.out), _tensors(new), strict=True):
                    if old is not value:
                        old.copy_(value)
            for tensor in ends.get(index, ()):
                _poison(tensor)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _described(leaf: Any) -> str:
    """Of a tensor what it is, of anything else its text, in which NaN equals NaN."""
    if isinstance(leaf, Tensor):
        return f"{tuple(leaf.shape)} {leaf.stride()} {leaf.storage_offset()} {leaf.dtype}"
    return repr(leaf)


def _poison(tensor: Tensor) -> None:
    """Fill all of its memory: with NaN, with numbers that are no index, with True."""
    whole = tensor.new_empty(0).set_(tensor.untyped_storage())
    if tensor.dtype == torch.bool:
        whole.fill_(True)
    else:
        has_nan = tensor.is_floating_point() or tensor.is_complex()
        whole.fill_(torch.nan if has_nan else torch.iinfo(tensor.dtype).max // 2)
