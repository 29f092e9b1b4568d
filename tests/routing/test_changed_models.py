"""A model that is not what it seemed, at ``enable`` or later: right, or refused with a sentence before it runs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import check, decoder, not_enabled, prompt, refused
from models import Tiny, llava, qwen
from oracle import predict
from support import FEW, cache_of, close, enable, generate, new_tokens, snapshot
from torch import Tensor, nn

import reroute
from reroute.errors import RerouteError

# --- layers ---------------------------------------------------------------------------------------------------------


def test_a_decoder_that_stops_early() -> None:
    """Llama's loop ends where the configuration says."""
    tiny, whole = llava(layers=5), llava(layers=5)
    tiny.model.config.text_config.num_hidden_layers = 4
    with enable(tiny, FEW) as handle:
        output = generate(tiny, [prompt(tiny)], 3)
        assert len(handle.stats().layer_lengths) == len(cache_of(output).layers) == 4
    decoder(whole).layers = decoder(whole).layers[:4]
    sample = prompt(tiny)
    expected = predict(whole, sample, FEW, then=new_tokens(output, len(sample))[:-1])
    close(torch.stack(output.logits)[:, 0], expected.logits[len(sample) - 1 :])


def test_a_schedule_beyond_the_last_layer_that_runs() -> None:
    tiny = llava(layers=5)
    tiny.model.config.text_config.num_hidden_layers = 3
    with pytest.raises(RerouteError, match="Routing layer 3 does not exist: the model has 3 layers"):
        enable(tiny, FEW)


def test_fewer_layers_after_enable(own: Tiny) -> None:
    config = own.model.config.get_text_config()
    message = "num_hidden_layers=4" if own.is_qwen else "has changed since reroute.enable"
    with refused(own, message):
        config.num_hidden_layers = 4
    config.num_hidden_layers = 5
    with enable(own, FEW) as handle:
        check(own, handle)


def test_fewer_layers_in_a_decoder_that_runs_all() -> None:
    """Qwen2.5-VL's loop does not look at the number."""
    tiny = qwen(layers=5)
    tiny.model.config.get_text_config().num_hidden_layers = 4
    not_enabled(tiny, "runs 5 layers, and its configuration says num_hidden_layers=4")


def test_layers_that_were_removed(own: Tiny) -> None:
    """Caches still have a place for each that the configuration names."""
    decoder(own).layers = decoder(own).layers[:4]
    not_enabled(own, "runs 4 layers, and its configuration says num_hidden_layers=5")
    own.model.config.get_text_config().num_hidden_layers = 4
    with enable(own, FEW) as handle:
        check(own, handle)


def test_a_layer_that_is_listed_twice(own: Tiny) -> None:
    layers, config = decoder(own).layers, own.model.config.get_text_config()
    decoder(own).layers = nn.ModuleList([*layers, layers[2]])
    config.num_hidden_layers = 6
    config.layer_types = ["full_attention"] * 6
    not_enabled(own, "lists the same layer several times")
    decoder(own).layers[5] = copy.deepcopy(layers[2])
    not_enabled(own, "layer 5 uses place 2 of the cache")
    decoder(own).layers[5].self_attn.layer_idx = 5
    with enable(own, FEW) as handle:
        check(own, handle)


def test_layers_that_changed_places(own: Tiny) -> None:
    """Each still stores where it was."""
    layers = decoder(own).layers
    layers[1], layers[3] = layers[3], layers[1]
    not_enabled(own, "layer 1 uses place 3 of the cache")
    layers[1].self_attn.layer_idx, layers[3].self_attn.layer_idx = 1, 3
    with enable(own, FEW) as handle:
        check(own, handle)


def swap(layers: nn.ModuleList) -> None:
    layers[2], layers[4] = layers[4], layers[2]


AFTER_ENABLE: dict[str, Callable[[Any], Any]] = {
    "a layer is replaced": lambda text: text.layers.__setitem__(2, copy.deepcopy(text.layers[2])),
    "the last layer is replaced": lambda text: text.layers.__setitem__(4, copy.deepcopy(text.layers[4])),
    "layers change places": lambda text: swap(text.layers),
    "a layer is wrapped": lambda text: text.layers.__setitem__(2, Around(text.layers[2])),
    "all are replaced": lambda text: setattr(text, "layers", copy.deepcopy(text.layers)),
    "a layer is removed": lambda text: text.layers.__delitem__(2),
}


@pytest.mark.parametrize("what", AFTER_ENABLE)
def test_layers_that_change_after_enable(own: Tiny, what: str) -> None:
    text = decoder(own)
    layers = list(text.layers)
    with refused(own, "has changed since reroute.enable|runs 4 layers, and its configuration says"):
        AFTER_ENABLE[what](text)
    text.layers = nn.ModuleList(layers)
    with enable(own, FEW) as handle:
        check(own, handle)


def test_a_decoder_that_is_replaced_after_enable(own: Tiny) -> None:
    with refused(own, "has changed since reroute.enable"):
        own.model.model.language_model = copy.deepcopy(decoder(own))
    with enable(own, FEW) as handle:
        check(own, handle)


def test_a_base_model_that_is_replaced_after_enable(own: Tiny) -> None:
    base, inputs = own.model.model, own.inputs([prompt(own)])
    with enable(own, FEW) as handle:
        own.model.model = copy.deepcopy(base)
        with pytest.raises(RerouteError, match=r"has changed since reroute\.enable"):
            own.model(**inputs)
        with pytest.raises(RerouteError, match=r"has changed since reroute\.enable"):
            own.model.generate(**inputs, max_new_tokens=1)
        with handle.at(keep=1.0):
            own.model(**inputs)
        own.model.model = base
        check(own, handle)


def test_layers_that_are_left_alone_in_another_list(own: Tiny) -> None:
    with enable(own, FEW) as handle:
        decoder(own).layers = nn.ModuleList(list(decoder(own).layers))
        check(own, handle)


class Around(nn.Module):
    """What FSDP1, profilers and loggers put around a module: it has all that the module has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("part", ["base", "decoder"])
def test_a_wrapper_around_a_part_after_enable(own: Tiny, part: str) -> None:
    base = own.model.model
    with enable(own, FEW) as handle:
        if part == "base":
            own.model.model = Around(base)
        else:
            base.language_model = Around(base.language_model)
        output = own.model(**own.inputs([prompt(own)]))
        assert handle.stats().prefills == 1
    if part == "base":
        own.model.model = base
    else:
        base.language_model = base.language_model.inner
    close(output.logits[0], predict(own, prompt(own), FEW).logits)


# --- what ranks -----------------------------------------------------------------------------------------------------


class Fused(nn.Module):
    """Query, keys and values in one matrix, as optimisers leave them; it computes what it did before."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.plain = [attention]
        self.head_dim, self.scaling, self.layer_idx = attention.head_dim, attention.scaling, attention.layer_idx
        self.qkv_proj = nn.Linear(1, 1)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.plain[0](*args, **kwargs)


GONE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "q_proj": (lambda layer: delattr(layer.self_attn, "q_proj"), "self_attn.q_proj"),
    "k_proj": (lambda layer: delattr(layer.self_attn, "k_proj"), "self_attn.k_proj"),
    "k_proj is None": (lambda layer: setattr(layer.self_attn, "k_proj", None), "self_attn.k_proj"),
    "input_layernorm": (lambda layer: delattr(layer, "input_layernorm"), "input_layernorm"),
    "self_attn": (lambda layer: delattr(layer, "self_attn"), "self_attn"),
    "head_dim": (lambda layer: delattr(layer.self_attn, "head_dim"), "head_dim"),
    "scaling": (lambda layer: delattr(layer.self_attn, "scaling"), "scaling"),
    "fused": (lambda layer: setattr(layer, "self_attn", Fused(layer.self_attn)), "self_attn.q_proj"),
}


@pytest.mark.parametrize("what", GONE)
@pytest.mark.parametrize("index", [1, 4])
def test_what_ranks_is_missing(own: Tiny, what: str, index: int) -> None:
    """In any layer that runs compact."""
    remove, path = GONE[what]
    remove(decoder(own).layers[index])
    not_enabled(own, f"Decoder layer {index} .* no .*'{path}'")


def test_a_layer_before_all_decisions_may_be_anything(own: Tiny) -> None:
    """But for another schedule, which would rank there."""
    layers, given = decoder(own).layers, own.inputs([prompt(own)])
    with enable(own, FEW):
        expected = own.model(**given).logits
    layers[0].self_attn = Fused(layers[0].self_attn)
    with enable(own, FEW) as handle:
        assert torch.equal(own.model(**given).logits, expected)
        with pytest.raises(RerouteError, match=r"Decoder layer 0 .* has no 'self_attn\.q_proj'"):
            handle.at(schedule=reroute.Schedule((0,), (0.5,)))


@pytest.mark.parametrize("index", [1, 4])
def test_a_layer_that_is_wrapped(own: Tiny, index: int) -> None:
    class Wrapper(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

    decoder(own).layers[index] = Wrapper(decoder(own).layers[index])
    not_enabled(own, rf"Decoder layer {index} \(Wrapper\) has no 'self_attn'")


@pytest.mark.parametrize("what", GONE)
def test_what_ranks_is_gone_after_enable(own: Tiny, what: str) -> None:
    remove, path = GONE[what]
    with refused(own, f"Decoder layer 3 .* no .*'{path}'"):
        remove(decoder(own).layers[3])


def linear(module: nn.Linear) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(module.in_features, module.out_features).requires_grad_(False)


REPLACED: dict[str, Callable[[Any], Any]] = {
    "q_proj": lambda layer: setattr(layer.self_attn, "q_proj", linear(layer.self_attn.q_proj)),
    "k_proj": lambda layer: setattr(layer.self_attn, "k_proj", linear(layer.self_attn.k_proj)),
    "input_layernorm": lambda layer: setattr(layer, "input_layernorm", nn.LayerNorm(64).requires_grad_(False)),
    "self_attn": lambda layer: setattr(layer, "self_attn", copy.deepcopy(layer.self_attn)),
    "scaling": lambda layer: setattr(layer.self_attn, "scaling", 0.5),
    "weights": lambda layer: layer.self_attn.q_proj.weight.mul_(-2),
}


@pytest.mark.parametrize("when", ["before enable", "after enable"])
@pytest.mark.parametrize("what", REPLACED)
def test_what_ranks_is_replaced(own: Tiny, what: str, when: str) -> None:
    """It is looked up in each call, so the new one ranks."""
    with torch.no_grad():
        if when == "before enable":
            REPLACED[what](decoder(own).layers[3])
        with enable(own, FEW) as handle:
            if when == "after enable":
                check(own, handle)
                REPLACED[what](decoder(own).layers[3])
            check(own, handle)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 1.25


def parametrise(part: nn.Module) -> None:
    torch.nn.utils.parametrize.register_parametrization(part, "weight", Doubled())


CHANGED: dict[str, Callable[[Any], Any]] = {
    "parametrised": parametrise,
    "a hook before": lambda part: part.register_forward_pre_hook(lambda _, args: (args[0] * 0.5,)),
    "a hook behind": lambda part: part.register_forward_hook(lambda _, args, out: out * 1.5),
    "another forward": lambda part: setattr(part, "forward", functools.partial(type(part).forward, part)),
}


@pytest.mark.parametrize("when", ["before enable", "after enable"])
@pytest.mark.parametrize("what", CHANGED)
def test_what_ranks_is_changed_by_others(own: Tiny, what: str, when: str) -> None:
    """Projections and norms are called, whatever others put on them."""
    layer, sample = decoder(own).layers[3], prompt(own)
    plain = predict(own, sample, FEW).decisions[0][1].scores

    def change() -> None:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.input_layernorm):
            CHANGED[what](part)

    if when == "before enable":
        change()
    with enable(own, FEW) as handle:
        if when == "after enable":
            change()
        check(own, handle)
    assert "forward" in what or not torch.equal(predict(own, sample, FEW).decisions[0][1].scores, plain)
    dense = own.model(**own.inputs([sample])).logits
    reroute.enable(own.model, keep=1.0)
    assert torch.equal(own.model(**own.inputs([sample])).logits, dense)


@pytest.mark.parametrize("what", ["parametrised", "a hook behind"])
def test_decoder_layers_are_changed_by_others(own: Tiny, what: str) -> None:
    """As for steering: what they add to a layer's output, or to its weights, they add to the rows that run."""
    layer = decoder(own).layers[2]
    if what == "parametrised":
        parametrise(layer.mlp.down_proj)
    else:
        layer.mlp.register_forward_hook(lambda _, args, out: out + 0.5)
    with enable(own, FEW) as handle:
        check(own, handle)


# --- models that share parts ----------------------------------------------------------------------------------------


def share_base(a: Any, b: Any) -> None:
    b.model = a.model


def share_decoder(a: Any, b: Any) -> None:
    b.model.language_model = a.model.language_model


def share_layers(a: Any, b: Any) -> None:
    b.model.language_model.layers = a.model.language_model.layers


def share_one_layer(a: Any, b: Any) -> None:
    b.model.language_model.layers[4] = a.model.language_model.layers[4]


@pytest.mark.parametrize("share", [share_base, share_decoder, share_layers, share_one_layer])
def test_models_that_share_modules(own: Tiny, share: Callable[[Any, Any], None]) -> None:
    """One of them can be routed at a time; unless they share the base model, the other one is the plain model."""
    other = (qwen if own.is_qwen else llava)(layers=5, seed=1)
    share(own.model, other.model)
    given = other.inputs([prompt(other)])
    plain = other.model(**given).logits
    with enable(own, FEW) as handle:
        check(own, handle)
        if share is not share_base:
            assert torch.equal(other.model(**given).logits, plain)
        before = snapshot(own.model), snapshot(other.model)
        with pytest.raises(RerouteError, match="is a part of another model that is routed"):
            enable(other, FEW)
        assert (snapshot(own.model), snapshot(other.model)) == before
        check(own, handle)
    assert torch.equal(other.model(**given).logits, plain)
    with enable(other, FEW) as handle:
        check(other, handle)


def test_models_that_share_weights(own: Tiny) -> None:
    """Modules of their own with the same parameters are two models."""
    other = (qwen if own.is_qwen else llava)(layers=5, seed=1)
    for (name, _), parameter in zip(list(other.model.named_parameters()), own.model.parameters(), strict=True):
        path, _, leaf = name.rpartition(".")
        setattr(other.model.get_submodule(path), leaf, parameter)
    with enable(own, FEW) as one, enable(other, FEW) as two:
        check(own, one)
        check(other, two)
