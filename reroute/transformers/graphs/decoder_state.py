"""What a decoder is made of, by identity and address: what a graph of it has baked in."""

from __future__ import annotations

from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module

__all__ = ["DecoderState", "has_hooks_of_others"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
INSTEAD = ("forward", "_hf_hook", "_compiled_call_impl")
"""Attributes that a module has where its class does not decide what runs: accelerate's, ``module.compile()``'s."""


class DecoderState:
    """The modules, weights and hooks of a decoder at one moment."""

    def __init__(self, text: nn.Module) -> None:
        """As they are now."""
        modules = [vars(module) for module in text.modules()]
        parts = [its[name] for its in modules for name in ("_modules", "_parameters", "_buffers", *HOOKS)]
        tensors = [t for its in modules for name in ("_parameters", "_buffers") for t in its[name].values()]
        # An attribute that hides one of the class is a new entry of the module.
        self._modules = [(its, len(its), its["training"]) for its in modules]
        self._empty = [part for part in parts if not part]
        self._parts = [(part, list(part.values())) for part in parts if part]
        self._tensors = [tensor for tensor in tensors if tensor is not None]
        self._addresses = self._addresses_now()
        self.devices = {tensor.device for tensor in self._tensors}

    @property
    def still_is(self) -> bool:
        """Whether all is as it was, values of weights apart. Asked at each call, so it is written to be fast."""
        if any(self._empty) or self._addresses_now() != self._addresses:
            return False
        for its, count, training in self._modules:
            if len(its) != count or its["training"] is not training:
                return False
        return all(len(part) == len(values) and all(map(is_, part.values(), values)) for part, values in self._parts)

    def _addresses_now(self) -> list[int]:
        return [tensor.data_ptr() for tensor in self._tensors]


def has_hooks_of_others(text: nn.Module) -> bool:
    """Whether a module of the decoder has forward hooks that are not Transformers' own, or something in their place."""
    if any(getattr(torch_module, f"_global{name}") for name in HOOKS):
        return True
    for module in text.modules():
        its: dict[str, Any] = vars(module)
        hooks = (hook for name in HOOKS for hook in its[name].values())
        if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            return True
        if any(its.get(name) is not None for name in INSTEAD):
            return True
    return False
