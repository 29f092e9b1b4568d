"""Models that routing refuses, made of one that it takes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
from models import Tiny
from support import FEW, enable, snapshot
from torch import nn


def whole(model: Any) -> Any:
    """Classes, attributes and hooks of all modules, and the state of the configuration."""
    classes = {name: type(module) for name, module in model.named_modules(remove_duplicate=False)}
    return classes, snapshot(model), copy.deepcopy(model.config.to_dict())


def changed(owner: Any, name: str, value: Any) -> Callable[[Tiny], Any]:
    """A model with another attribute: ``owner`` finds whose."""

    @contextmanager
    def change(few: Tiny) -> Iterator[Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner(few.model), name, value, raising=False)
            yield few.model

    return change


def replaced(owner: Any, name: str, module: Any) -> Callable[[Tiny], Any]:
    """A model with another module, or none."""

    @contextmanager
    def change(few: Tiny) -> Iterator[Any]:
        parent = owner(few.model)
        plain = parent._modules[name]
        parent._modules[name] = module(plain) if callable(module) else module
        try:
            yield few.model
        finally:
            parent._modules[name] = plain

    return change


class Wrapped(nn.Module):
    """What hides a layer's parts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner


@contextmanager
def listed_twice(few: Tiny) -> Iterator[Any]:
    layers = few.model.model.language_model.layers
    plain = layers[2]
    layers[2] = layers[1]
    try:
        yield few.model
    finally:
        layers[2] = plain


@contextmanager
def shared(few: Tiny, part: Callable[[Any], nn.Module], name: str) -> Iterator[Any]:
    """Another model, of which a part is routed as one of ``few``'s."""
    other = models.llava(layers=5) if not few.is_qwen else models.qwen(layers=5)
    part(other.model)._modules[name] = part(few.model)._modules[name]
    with enable(few, FEW):
        yield other.model


class Wrapper(nn.Module):
    """PEFT's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def get_base_model(self) -> nn.Module:
        return self.model


def text(model: Any) -> Any:
    return model.config.get_text_config()


def decoder(model: Any) -> Any:
    return model.model.language_model


def layer(model: Any) -> Any:
    return decoder(model).layers[1]


MODELS: dict[str, Callable[[Tiny], Any]] = {
    "a model that cannot be right": changed(lambda model: type(model.config), "model_type", "gemma3n"),
    "a decoder without rotary tables": replaced(decoder, "rotary_emb", None),
    "attention with unknown masks": changed(text, "_attn_implementation", "an_own_function"),
    "sliding windows": changed(text, "layer_types", ["full_attention"] * 4 + ["sliding_attention"]),
    "tensor parallelism": changed(lambda model: model, "_tp_size", 2),
    "no decoder": replaced(lambda model: model.model, "language_model", None),
    "no base model": replaced(lambda model: model, "model", None),
    "a wrapped layer": replaced(lambda model: decoder(model).layers, "2", Wrapped),
    "a layer without its norm": replaced(layer, "input_layernorm", None),
    "a layer without attention": replaced(layer, "self_attn", None),
    "attention without queries": replaced(lambda model: layer(model).self_attn, "q_proj", None),
    "attention without keys": replaced(lambda model: layer(model).self_attn, "k_proj", None),
    "a layer listed twice": listed_twice,
    "a shared decoder": lambda few: shared(few, lambda model: model.model, "language_model"),
    "a shared layer": lambda few: shared(few, lambda model: decoder(model).layers, "3"),
    "a shared base model": lambda few: shared(few, lambda model: model, "model"),
}
