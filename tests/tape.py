"""A stand-in for a CUDA graph on the CPU: the operations of a run, each with its tensors, to be run again on the same
memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Tape"]

_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


@dataclass(frozen=True)
class _Step:
    """One operation. ``writes``: to memory that it was given or made; a view and an allocation do not.

    ``outputs``: its tensors. ``memory``: what it reads and writes.
    """

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    memory: frozenset[int]
    writes: bool

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a graph has baked in: the operation, shapes, strides and dtypes, and every other argument."""
        return str(self.func), *map(_described, _leaves((self.args, self.kwargs)))


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
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {_memory(tensor): tensor for tensor in _tensors((args, kwargs))}
        for memory, tensor in given.items():
            if memory not in self._made:
                self._external.setdefault(memory, tensor)
        outputs = _tensors(out)
        made = {_memory(tensor): tensor for tensor in outputs if _memory(tensor) not in given}
        self._made |= made
        is_view = not made and not func._schema.is_mutable
        writes = not is_view and func.overloadpacket.__name__ not in _ALLOCATIONS
        self._steps.append(_Step(func, args, kwargs, outputs, frozenset((*given, *made)), writes))
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
        last = {memory: index for index, step in enumerate(self._steps) for memory in step.memory}
        ends: dict[int, list[Tensor]] = {}
        for memory, use in last.items():
            if memory in self._made and memory not in kept:
                ends.setdefault(use, []).append(self._made[memory])
        for tensor in self._made.values():
            _poison(tensor)
        for index, step in enumerate(self._steps):
            if step.writes:
                for old, value in zip(step.outputs, _tensors(step.func(*step.args, **step.kwargs)), strict=True):
                    if old is not value:
                        old.copy_(value)
            for tensor in ends.get(index, ()):
                _poison(tensor)


def _leaves(tree: Any) -> list[Any]:
    """What is in ``tree``. PyTorch's own ``tree_leaves`` takes longer than the operations of a small model."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return [tree]
    return [leaf for branch in tree for leaf in _leaves(branch)]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


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
