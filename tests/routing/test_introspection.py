"""A routed model looks as it did: to who prints it, and to tools that go by names, classes and signatures."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from changes import decoder, prompt
from models import Tiny
from support import FEW, close, enable
from torch import nn
from transformers import GenerationMixin, PreTrainedModel

import reroute

METHODS = ("generate", "forward", "prepare_inputs_for_generation")
"""What routing lies before, and what others look at."""


def intercepted(tiny: Tiny) -> list[nn.Module]:
    return [tiny.model, tiny.model.model, decoder(tiny), *decoder(tiny).layers]


def seen(tiny: Tiny, look: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What ``look`` finds without routing, and with it."""
    plain = look(tiny.model)
    with enable(tiny, FEW):
        return plain, look(tiny.model)


# --- methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_signatures(few: Tiny, name: str) -> None:
    """``generate`` itself reads those of the other two, to find out what a model takes."""
    plain, routed = seen(few, lambda model: inspect.signature(getattr(model, name)))
    assert routed == plain
    plain, routed = seen(few, lambda model: inspect.signature(getattr(type(model), name)))
    assert routed == plain


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_methods(few: Tiny, name: str) -> None:
    """Not functions that were put on the model."""
    kind = type(few.model)
    with enable(few, FEW):
        method = getattr(few.model, name)
        assert inspect.ismethod(method)
        assert method.__self__ is few.model
        assert method.__func__ is getattr(type(few.model), name)
        assert name not in vars(few.model)
        assert inspect.unwrap(method.__func__) is inspect.unwrap(getattr(kind, name))
    assert getattr(few.model, name).__func__ is getattr(kind, name)


@pytest.mark.parametrize("attribute", ["__name__", "__qualname__", "__module__", "__doc__", "__annotations__"])
@pytest.mark.parametrize("name", METHODS)
def test_attributes_of_methods(few: Tiny, name: str, attribute: str) -> None:
    plain, routed = seen(few, lambda model: getattr(getattr(model, name), attribute))
    assert routed == plain


def test_source_of_methods(few: Tiny) -> None:
    for name in METHODS:
        plain, routed = seen(few, lambda model: inspect.getsource(getattr(model, name)))  # noqa: B023
        assert routed == plain


def test_unbound_methods(few: Tiny) -> None:
    """``type(model).generate(model, …)``, as decorators and tests call it, is routed too."""
    given = {**few.inputs([prompt(few)]), "max_new_tokens": 3, "do_sample": False}
    with enable(few, FEW) as handle:
        tokens, logits = few.model.generate(**given), few.model(**few.inputs([prompt(few)])).logits
        assert torch.equal(type(few.model).generate(few.model, **given), tokens)
        assert torch.equal(type(few.model).forward(few.model, **few.inputs([prompt(few)])).logits, logits)
        assert handle.totals().prefills == 4


def test_what_generate_takes(few: Tiny) -> None:
    """A mistyped argument is refused as by the plain model, and nothing of routing is offered instead."""
    given = few.inputs([prompt(few)])

    def mistyped(model: Any) -> str:
        with pytest.raises(ValueError, match="pixelvalues") as error:
            model.generate(**given, pixelvalues=1, max_new_tokens=2)
        return str(error.value)

    plain, routed = seen(few, mistyped)
    assert routed == plain


# --- classes ------------------------------------------------------------------------------------------------------

LOOKS: dict[str, Callable[[Any], Any]] = {
    "names": lambda model: [type(m).__name__ for m in model.modules()],
    "qualified names": lambda model: [type(m).__qualname__ for m in model.modules()],
    "modules": lambda model: [type(m).__module__ for m in model.modules()],
    "classes as text": lambda model: [str(type(m)) for m in model.modules()],
    "docstrings": lambda model: [type(m).__doc__ for m in model.modules()],
    "names by themselves": lambda model: [m._get_name() for m in model.modules()],
    "repr": repr,
    "paths": lambda model: [name for name, _ in model.named_modules()],
    "weights": lambda model: list(model.state_dict()),
    "can_generate": lambda model: model.can_generate(),
    "main_input_name": lambda model: model.main_input_name,
    "base_model_prefix": lambda model: (model.base_model_prefix, model.base_model is model.model),
    "modules that stay whole": lambda model: sorted(model._no_split_modules or ()),
    "framework": lambda model: model.framework if hasattr(model, "framework") else None,
    "configuration": lambda model: model.config.to_dict(),
    "generation configuration": lambda model: model.generation_config.to_dict(),
    "parameters": lambda model: [id(p) for p in model.parameters()],
    "hooks": lambda model: [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    "number of parameters": lambda model: model.num_parameters(),
}


@pytest.mark.parametrize("look", LOOKS)
def test_what_it_looks_like(few: Tiny, look: str) -> None:
    plain, routed = seen(few, LOOKS[look])
    assert routed == plain


def test_it_is_still_one_of_its_kind(few: Tiny) -> None:
    kinds = [type(module) for module in intercepted(few)]
    with enable(few, FEW):
        for module, kind in zip(intercepted(few), kinds, strict=True):
            assert isinstance(module, kind)
            assert issubclass(type(module), kind)
        assert isinstance(few.model, GenerationMixin)
        assert isinstance(few.model, PreTrainedModel)
    assert [type(module) for module in intercepted(few)] == kinds


def test_layers_of_a_class_stay_of_one_class(few: Tiny) -> None:
    """Policies that wrap, split or compile by class see one, as before."""
    plain, routed = seen(few, lambda model: len({type(layer) for layer in model.model.language_model.layers}))
    assert routed == plain == 1
    first = enable(few, FEW)
    kind = type(few.model)
    first.disable()
    with enable(few, FEW):
        assert type(few.model) is kind


# --- what goes by them --------------------------------------------------------------------------------------------


def test_what_save_pretrained_writes(few: Tiny, tmp_path: Path) -> None:
    with enable(few, FEW):
        few.model.save_pretrained(tmp_path / "routed")
    few.model.save_pretrained(tmp_path / "plain")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("plain", "routed")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "routed" / name).read_bytes(), name
    config = json.loads((tmp_path / "routed" / "config.json").read_text())
    assert config["architectures"] == [type(few.model).__name__]


def test_a_saved_model_is_the_plain_one(few: Tiny, tmp_path: Path) -> None:
    kind, plain = type(few.model), few.model(**few.inputs([prompt(few)])).logits
    with enable(few, FEW):
        few.model.save_pretrained(tmp_path)
        read = type(few.model).from_pretrained(tmp_path)
    assert reroute.handle_of(read) is None
    assert torch.equal(kind.from_pretrained(tmp_path)(**few.inputs([prompt(few)])).logits, plain)
    assert torch.equal(read(**few.inputs([prompt(few)])).logits, plain)


def test_loading_weights_into_a_routed_model(own: Tiny) -> None:
    state = {name: value.clone() for name, value in own.model.state_dict().items()}
    with enable(own, FEW):
        routed = own.model(**own.inputs([prompt(own)])).logits
        own.model.lm_head.weight.mul_(2)
        assert own.model.load_state_dict(state) == ([], [])
        assert torch.equal(own.model(**own.inputs([prompt(own)])).logits, routed)


@pytest.mark.parametrize("first", ["plain", "routed"])
def test_outputs_that_are_captured_by_class(own: Tiny, first: str) -> None:
    """Transformers records hidden states and attentions of modules of certain classes, from the first call on."""
    own.model.set_attn_implementation("eager")
    given = own.inputs([prompt(own)])
    ask = functools.partial(own.model, **given, output_hidden_states=True, output_attentions=True)
    if first == "plain":
        plain = ask()
    with enable(own, FEW) as handle:
        routed = ask()
        lengths = handle.stats().layer_lengths
    if first == "routed":
        plain = ask()
    assert len(routed.hidden_states) == len(plain.hidden_states) == 6
    assert [a.shape[-1] for a in routed.attentions] == list(lengths)
    assert [a.shape for a in plain.attentions] == [plain.attentions[0].shape] * 5
    for ours, theirs in zip(routed.hidden_states[:2], plain.hidden_states[:2], strict=True):
        close(ours, theirs)


def test_policies_that_go_by_class(few: Tiny) -> None:
    """As FSDP's and accelerate's: by isinstance, by the name of the class, by a set of classes."""
    kind = type(decoder(few).layers[0])
    expected = [name for name, module in few.model.named_modules() if isinstance(module, kind)]
    with enable(few, FEW):
        modules = list(few.model.named_modules())
        assert [name for name, module in modules if isinstance(module, kind)] == expected
        assert [name for name, module in modules if type(module).__name__ == kind.__name__] == expected
        assert len(expected) == 5


def test_applying_a_function_to_all_modules(own: Tiny) -> None:
    """Initialisation, casts and moves."""
    names: list[str] = []
    with enable(own, FEW) as handle:
        own.model.apply(lambda module: names.append(type(module).__name__))
        own.model.double()
        output = own.model(
            **{k: v.double() if v.is_floating_point() else v for k, v in own.inputs([prompt(own)]).items()}
        )
        assert output.logits.dtype == torch.float64
        assert handle.totals().prefills == 1
    assert names == [type(module).__name__ for module in _depth_first(own.model)]


def _depth_first(module: nn.Module) -> list[nn.Module]:
    return [*(inner for child in module.children() for inner in _depth_first(child)), module]
