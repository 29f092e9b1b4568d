"""What a decoder is made of, by identity and address: what a graph of it has baked in."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from operator import is_, itemgetter
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from ...held import held_by, is_wrapper

__all__ = ["DecoderState", "forward_of", "has_hooks_of_others"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
PARTS = ("_modules", "_parameters", "_buffers", *HOOKS)
OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""
INSTEAD = ("_hf_hook", "_compiled_call_impl")
"""Attributes of modules around which something else runs: accelerate's, ``module.compile()``'s."""


class DecoderState:
    """The modules of a decoder at one moment, their weights, hooks and settings."""

    def __init__(self, text: nn.Module) -> None:
        """As they are now."""
        # An attribute that hides one of the class is a new entry of the module.
        self._modules = [vars(module) for module in text.modules()]
        parts = [its[name] for its in self._modules for name in PARTS]
        self._empty, self._filled = [part for part in parts if not part], [part for part in parts if part]
        self._values = list(_values(self._filled))
        tensors = [value for value in self._values if isinstance(value, torch.Tensor)]
        self._tensors = [tensor for tensor in tensors if not is_wrapper(tensor)]
        self._wrapped = [tensor for tensor in tensors if is_wrapper(tensor)]
        self._sizes, self._addresses = self._sizes_now(), self._addresses_now()
        # Of settings, which are many, ``nn.Linear`` reads none when it is called.
        self._reading = [vars(module) for module in text.modules() if type(module) is not nn.Linear]
        self._getters = [itemgetter("training", *_settings(its)) for its in self._reading]
        self._settings = copy.deepcopy(self._settings_now())
        self._forwards = [(its, its["forward"]) for its in self._modules if "forward" in its]
        self.devices = {tensor.device for tensor in tensors}
        self.is_training = any(map(itemgetter("training"), self._modules))

    @property
    def is_in_place(self) -> bool:
        """Whether the weights that there were are where they were; all that a graph may read is held here."""
        return self._addresses_now() == self._addresses

    @property
    def still_is(self) -> bool:
        """Whether all is as it was, values of weights apart. Asked at each call, so nearly all of it runs in C."""
        return (
            not any(self._empty)
            and self._sizes_now() == self._sizes
            and all(map(is_, _values(self._filled), self._values))
            and self.is_in_place
            and self._settings_now() == self._settings
            and all(its.get("forward") is forward for its, forward in self._forwards)
        )

    def _sizes_now(self) -> tuple[list[int], list[int]]:
        return list(map(len, self._modules)), list(map(len, self._filled))

    def _settings_now(self) -> list[Any]:
        return [getter(its) for getter, its in zip(self._getters, self._reading, strict=True)]

    def _addresses_now(self) -> list[int]:
        inner = chain.from_iterable(map(held_by, self._wrapped))  # of quantised weights, say, which have no address
        return list(map(torch.Tensor.data_ptr, chain(self._tensors, inner)))


def _settings(module: dict[str, Any]) -> list[str]:
    """Names of attributes of a module that are plain values, as scales, epsilons and names of adapters are."""
    return [name for name, value in module.items() if name not in OWN and _is_plain(value)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_plain([*value, *value.values()])
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _values(parts: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, parts))


def has_hooks_of_others(text: nn.Module) -> bool:
    """Whether a module of the decoder has forward hooks that are not Transformers' own, or something in their place."""
    if any(getattr(torch_module, f"_global{name}") for name in HOOKS):
        return True
    for module in text.modules():
        its: dict[str, Any] = vars(module)
        hooks = (hook for name in HOOKS for hook in its[name].values())
        if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            return True
        if any(its.get(name) is not None for name in INSTEAD) or not _has_own_forward(module):
            return True
    return False


def forward_of(module: nn.Module) -> Any:
    """What runs as the ``forward`` of ``module``: a function of its class, or what it has in place of that."""
    return vars(module).get("forward", type(module).forward)


def _has_own_forward(module: nn.Module) -> bool:
    """Whether the ``forward`` of ``module`` is that of its class, or what libraries of kernels put there: a function
    bound to it that holds nothing else, so that it is not around another and tells nobody.
    """
    if "forward" not in vars(module):
        return True
    forward = forward_of(module)
    function = forward.__func__ if isinstance(forward, MethodType) and forward.__self__ is module else None
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return False
    return set(function.__code__.co_freevars) <= {"__class__"}
