"""Dry runs: what a decoder layer hands to its attention function, seen without its weights.

The layer's own code runs on a few random rows. Its projections are stood in for by a choice of features, and its norms
have random weights, so that a run costs the same for a model of any size, wherever its weights are and however they are
stored, and weights that happen to be trivial hide nothing. The model itself is not called and not changed.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MappingProxyType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from transformers import AttentionInterface

from .projections import projections_of
from .tables import in_form_of, tables_in

__all__ = ["DryRun", "Inputs", "Seen", "is_projection", "layers_get", "on_cpu", "rows", "states_between"]

ROWS = 24
FAR = 2**17
"""Positions from here on are beyond every length up to which a query scale that grows with them is 1."""
SPREAD = 3.0
"""Of queries and keys: logits then reach some 50, where a soft cap would show."""
IMPLEMENTATION = "reroute_dry_run"
"""Name of the attention function that tells what it gets."""
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith(("hooks", "with_kwargs", "always_called")))
EPSILONS = ("variance_epsilon", "eps")
"""What norms call their epsilon."""
OWN = ("forward", "_compiled_call_impl", "_hf_hook", "_old_forward", "_reroute")
"""What others put on one module beside hooks."""


class Inputs(NamedTuple):
    """What a layer is run on: hidden (1, R, C), tables (1, R, rot) each, ids (1, R), an additive mask (1, 1, R, R).

    ``given``: tables as the decoder gives them to the layer, whose form it gets; without any, those here turn nothing.
    """

    hidden: Tensor
    cos: Tensor
    sin: Tensor
    ids: Tensor
    mask: Tensor
    given: Any = None

    @classmethod
    def of(cls, hidden: Tensor, given: Any, ids: Tensor) -> Inputs:
        """With a causal mask, and tables that the decoder gives."""
        mask = torch.full((ROWS, ROWS), torch.finfo(torch.float32).min).triu(1)
        cos, sin = tables_in(given) or (torch.ones(1, ROWS, 2), torch.zeros(1, ROWS, 2))
        return cls(hidden, cos, sin, ids, mask[None, None], given)

    def unrotated(self) -> Inputs:
        """The same with tables that turn nothing."""
        return self._replace(cos=torch.ones_like(self.cos), sin=torch.zeros_like(self.sin))


class Seen(NamedTuple):
    """What the attention function gets: query (H, R, D), key (G, R, D), its mask, and all keyword arguments.

    ``rows``: what the projections to queries and to keys were called with before.
    """

    query: Tensor
    key: Tensor
    mask: Any
    options: Mapping[str, Any]
    rows: tuple[Tensor, Tensor]


class _Reached(BaseException):
    """Carries what the attention function got past any ``except Exception`` of a layer."""

    def __init__(self, query: Tensor, key: Tensor, mask: Any, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = query[0], key[0], mask, options


class _Mixed(BaseException):
    """The same of what a mixer returns."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def _tell(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
    raise _Reached(query, key, attention_mask, options)


def _tell_mixed(module: Any, args: Any, output: Any) -> None:
    raise _Mixed(output)


AttentionInterface.register(IMPLEMENTATION, _tell)


class DryRun:
    """A decoder layer with stand-ins for what it is made of.

    ``layer`` and ``attention`` are copies: what is not stood in for is shared with the model, and not called.
    """

    def __init__(self, layer: Any, attention: str, seed: int = 0) -> None:
        """Of ``layer``, whose attention, or what keeps its state, is its child of that name."""
        self._generator = torch.Generator().manual_seed(seed)
        layer = getattr(layer, "_orig_mod", layer)
        of = getattr(layer, attention)
        of = getattr(of, "_orig_mod", of)
        self._inputs: dict[str, Tensor] = {}
        self.attention = self._stood_in(of)
        if hasattr(of, "config"):
            self.attention.config = _Config(of.config)
        self.projections = projections_of(self.attention)
        for name, child in self.attention.named_children():
            if isinstance(child, _Projection):
                child.register_forward_pre_hook(self._noting(name), with_kwargs=True)
        others = {name: self._child(child) for name, child in layer.named_children() if name != attention}
        self.layer = _clone(layer, {**others, attention: self.attention})
        self._arguments = inspect.signature(type(layer).forward).parameters

    @property
    def arguments(self) -> tuple[str, ...]:
        """Names of what the layer can be called with, but for ``**kwargs``."""
        named = [name for name, one in self._arguments.items() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        return tuple(named[1:])

    def __call__(self, inputs: Inputs, past: int = 0) -> Seen | None:
        """What the attention function gets; None if none is called, or not behind projections that are known.

        ``past``: the length that a cache says it has.
        """
        try:
            self._run(inputs, past)
        except _Reached as reached:
            query, key, mask, options = reached.given
            order, (of_query, of_key) = self.projections.as_projected, self.projections.names
            if {of_query, of_key} <= self._inputs.keys():
                return Seen(order(query), order(key), mask, options, (self._inputs[of_query], self._inputs[of_key]))
        return None

    def mixed(self, inputs: Inputs) -> Tensor | None:
        """What the part that keeps a state returns (B, R, C); None if it calls an attention function instead."""
        _compute_plainly(self.attention)
        hook = self.attention.register_forward_hook(_tell_mixed)
        try:
            self._run(inputs)
        except _Mixed as mixed:
            return mixed.output
        except _Reached:
            pass
        finally:
            hook.remove()
        return None

    def _run(self, inputs: Inputs, past: int = 0) -> None:
        given: dict[str, Any] = {
            "attention_mask": inputs.mask,
            "position_ids": inputs.ids,
            "position_embeddings": in_form_of(inputs.given, inputs.cos, inputs.sin),
        }
        if past:
            given["cache" if "cache" in self._arguments else "past_key_values"] = _Cache(past)
        takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in self._arguments.values())
        named = self._arguments
        given = {name: value for name, value in given.items() if name in named or (takes_any and value is not None)}
        if "shared_kv_states" in self._arguments:
            given["shared_kv_states"] = {}  # a layer that has no keys of its own fails
        self._inputs.clear()
        type(self.layer).forward(self.layer, inputs.hidden, **given)

    def _noting(self, name: str) -> Any:
        def note(_: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._inputs[name] = args[0] if args else next(iter(kwargs.values()))

        return note

    def _stood_in(self, module: Any) -> Any:
        """A copy with random weights, and with stand-ins for its children."""
        copy = _clone(module, {name: self._child(child) for name, child in module.named_children()})
        copy._parameters = {
            name: None if weight is None else nn.Parameter(self._weights(weight), requires_grad=False)
            for name, weight in module._parameters.items()
        }
        return copy

    def _child(self, module: Any) -> Any:
        if is_projection(module):
            return _Projection(module, self._generator)
        has_matrices = any(weight.ndim > 1 for weight in module.parameters())
        if has_matrices and not _is_depthwise(module) and not _is_norm(module):
            return _Unknown(type(module).__name__)
        return self._stood_in(module)

    def _weights(self, like: Tensor) -> Tensor:
        """Around 1, as weights of norms are."""
        return 1 + 0.3 * torch.randn(like.shape, generator=self._generator)


def layers_get(
    text: Any, hidden: Tensor, ids: Tensor, settings: Mapping[str, Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What a decoder calls each of its layers with: arguments behind the hidden states, and keyword arguments.

    ``hidden`` (1, R, C) at position ``ids``, in eager mode, where masks are always made. Rotary frequencies are random,
    and long ids do not change them. ``settings`` replace those of the configuration.
    """
    calls, _ = _without_layers(text, hidden, ids, settings)
    return [(args[1:], kwargs) for args, kwargs in calls]


def states_between(text: Any, hidden: Tensor, ids: Tensor, **given: Any) -> list[Tensor]:
    """The hidden states that a decoder gives to each of its layers, and at last to its norm, if no layer changes them.

    It gets ``given`` besides what it gets in ``layers_get``.
    """
    calls, output = _without_layers(text, hidden, ids, {}, **given)
    return [*(args[0] for args, _ in calls), output.last_hidden_state]


Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def _without_layers(
    text: Any, hidden: Tensor, ids: Tensor, settings: Mapping[str, Any], **given: Any
) -> tuple[Calls, Any]:
    """What a decoder calls its layers with, hidden states first, and what it returns; its norms do nothing."""
    calls: Calls = []
    text = getattr(text, "_orig_mod", text)
    children = {name: _clone(child, child._modules) for name, child in text.named_children()}
    children.update({name: nn.Identity() for name in children if "norm" in name})
    for name in children:
        if "rotary" in name:
            children[name] = _with_random_buffers(children[name])
    if not any("rotary" in name for name in children):  # positions are in what it embeds
        for name in children:
            if "emb" in name:
                children[name].forward = lambda *_, **__: torch.zeros(1, 1, hidden.shape[-1])
    clone = _clone(text, children)
    clone.config = _Config(text.config, "eager", settings)
    for make in (lambda output: output, lambda output: (output,)):
        calls.clear()
        clone._modules["layers"] = nn.ModuleList(_Listening(layer, calls, make) for layer in text.layers)
        try:
            return calls, type(text).forward(clone, inputs_embeds=hidden, position_ids=ids, use_cache=False, **given)
        except _TakesFirst:
            continue
    raise NotImplementedError("it takes neither what a layer returns nor the first of that")


class _TakesFirst(Exception):
    """The decoder takes the first of what a layer returns: layers return tuples."""


class _Listening(nn.Module):
    """In the place of a layer, of which it has all attributes: notes what it is called with.

    It returns what ``make`` makes of its hidden states (1, R, C).
    """

    def __init__(
        self, layer: Any, calls: list[tuple[tuple[Any, ...], dict[str, Any]]], make: Callable[[Tensor], Any]
    ) -> None:
        super().__init__()
        self.__dict__.update(layer=layer, calls=calls, make=make)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, *others = args if args else (kwargs.pop("hidden_states"),)
        if hidden.ndim < 3:
            raise _TakesFirst
        self.calls.append(((hidden, *others), kwargs))
        return self.__dict__["make"](hidden)


class _Cache:
    """Says that it is of some length, and keeps nothing."""

    def __init__(self, length: int) -> None:
        self._length = length

    def get_seq_length(self, *_: Any) -> int:
        return self._length

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return keys, values


class _Config:
    """A configuration that names another attention function; all else is that of ``config``."""

    def __init__(
        self, config: Any, implementation: str = IMPLEMENTATION, settings: Mapping[str, Any] = MappingProxyType({})
    ) -> None:
        self._config, self._attn_implementation = config, implementation
        vars(self).update(settings)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


class _Projection(nn.Module):
    """In the place of a projection: each feature is one of the input, and a random bias if it has one."""

    def __init__(self, like: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.out_features = like.out_features
        self._choice = torch.rand(self.out_features, generator=generator)
        bias = torch.randn(self.out_features, generator=generator)
        self._bias = bias if getattr(like, "bias", None) is not None else torch.zeros(())

    def forward(self, rows: Tensor) -> Tensor:
        chosen = (self._choice * rows.shape[-1]).long()
        return rows[..., chosen] * SPREAD + self._bias


class _Unknown(nn.Module):
    """What has matrices and is no projection: it may not come before the attention function."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"it calls {self.name} before")


def rows(width: int) -> tuple[Tensor, Tensor]:
    """Random rows (1, R, C) of ``width`` features, and their position ids (1, R)."""
    ids = torch.arange(ROWS) * 37
    ids[ROWS // 2 :] += FAR
    return torch.randn(1, ROWS, width, generator=torch.Generator().manual_seed(2)), ids[None]


def _compute_plainly(module: Any) -> None:
    """Let ``module`` compute with Transformers' own functions, where it would call kernels that need a GPU."""
    code = inspect.unwrap(type(module).forward)
    used = {name: code.__globals__.get(name) for name in code.__code__.co_names}
    plain = {name: inspect.unwrap(value) for name, value in used.items() if hasattr(value, "__wrapped__")}
    scope = {**code.__globals__, **plain}
    function = FunctionType(code.__code__, scope, code.__name__, code.__defaults__, code.__closure__)
    function.__kwdefaults__ = code.__kwdefaults__
    module.forward = MethodType(function, module)


def is_projection(module: Any) -> bool:
    """Whether ``module`` maps features to features, whatever its weights are stored as."""
    return isinstance(getattr(module, "out_features", None), int)


def _is_norm(module: Any) -> bool:
    """Whether ``module`` norms features, perhaps of each head with weights of its own."""
    return not module._modules and any(hasattr(module, eps) for eps in EPSILONS)


def _is_depthwise(module: Any) -> bool:
    """Whether ``module`` mixes rows of each feature by itself, so that its weights are few."""
    return isinstance(module, nn.Conv1d) and module.groups == module.in_channels


def _clone(module: Any, children: Mapping[str, Any]) -> Any:
    """``module`` with other ``children``, without what others have put on it."""
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__["_modules"] = dict(children)
    clone.__dict__.update({name: OrderedDict() for name in HOOKS}, training=False)
    for name in OWN:
        clone.__dict__.pop(name, None)
    return clone


def _with_random_buffers(module: Any) -> Any:
    """A copy whose buffers, and what else it has of tensors, are real and random, whatever they are."""
    generator = torch.Generator().manual_seed(1)

    def other(value: Any) -> Any:
        return torch.rand(value.shape, generator=generator) if isinstance(value, Tensor) else value

    clone = _clone(module, module._modules)
    clone.__dict__.update({name: other(value) for name, value in vars(clone).items() if isinstance(value, Tensor)})
    clone.__dict__["_buffers"] = {name: other(value) for name, value in module._buffers.items()}
    return clone


@contextmanager
def on_cpu() -> Iterator[None]:
    """Compute for real, on the CPU and without gradients, whatever is going on around."""
    with _disable_current_modes(), torch.no_grad(), torch.device("cpu"):
        yield
