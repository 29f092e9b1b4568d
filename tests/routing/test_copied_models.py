"""Copies, files, bound methods and classes put over ours: what of a routed model outlives its routing, and what not."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from changes import check, decoder, prompt
from models import Tiny
from support import FEW, PLACES, enable, generate, schedule, snapshot
from torch import Tensor, nn

import reroute
from reroute.errors import RerouteError

PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "the model": lambda model: model,
    "the base model": lambda model: model.model,
    "the decoder": lambda model: model.model.language_model,
    "the layers": lambda model: model.model.language_model.layers,
    "a layer": lambda model: model.model.language_model.layers[3],
}
"""What is intercepted, or holds what is."""


def logits(tiny: Tiny, call: Callable[..., Any] | None = None) -> Tensor:
    output: Tensor = (tiny.model if call is None else call)(**tiny.inputs([prompt(tiny)])).logits
    return output


def saved(part: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(part, file)
    return file.getvalue()


def loaded(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda part: pickle.loads(pickle.dumps(part)),
    "an old pickle": lambda part: pickle.loads(pickle.dumps(part, protocol=2)),
    "torch.save": lambda part: loaded(saved(part)),
}


def classes(module: nn.Module) -> list[type]:
    return [type(inner) for inner in module.modules()]


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_plain(own: Tiny, how: str, part: str) -> None:
    """Of a model that was never called: Transformers leaves hooks in the first call that cannot be pickled."""
    which, make = PARTS[part], COPIES[how]
    plain = classes(which(own.model))
    with enable(own, FEW):
        made = make(which(own.model))
        assert classes(made) == plain
        assert not any("_reroute" in vars(module) for module in made.modules())
        for name, value in which(own.model).state_dict().items():
            assert torch.equal(made.state_dict()[name], value)


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_models_of_their_own(own: Tiny, how: str) -> None:
    with enable(own, FEW) as handle:
        twin = Tiny(COPIES[how](own.model), own.grid)
        plain = logits(twin)
        assert handle.totals().prefills == 0
        assert reroute.handle_of(twin.model) is None
        with enable(twin, FEW) as other:
            check(twin, other)
        check(own, handle)
    assert torch.equal(logits(own), plain)


@pytest.mark.parametrize("write", [pickle.dumps, saved])
def test_what_is_written_does_not_name_this_package(own: Tiny, write: Callable[[Any], bytes]) -> None:
    """It is read where nothing of it is installed."""
    with enable(own, FEW):
        assert b"reroute" not in write(own.model)


@pytest.mark.parametrize("part", PARTS)
def test_deep_copies_after_calls(own: Tiny, part: str) -> None:
    plain = classes(PARTS[part](own.model))
    with enable(own, FEW) as handle:
        check(own, handle)
        assert classes(copy.deepcopy(PARTS[part](own.model))) == plain


def test_a_deep_copy_of_a_part_that_is_put_back(own: Tiny) -> None:
    """Then the model has changed, and says so."""
    with enable(own, FEW):
        decoder(own).layers[3] = copy.deepcopy(decoder(own).layers[3])
        with pytest.raises(RerouteError, match="has changed since"):
            logits(own)
    with enable(own, FEW) as handle:
        check(own, handle)


# --- shallow copies -----------------------------------------------------------------------------------------------


def test_a_shallow_copy_is_routed_too(own: Tiny) -> None:
    """It shares the parts."""
    plain = logits(own)
    with enable(own, FEW) as handle:
        routed = logits(own)
        twin = copy.copy(own.model)
        assert torch.equal(logits(own, twin), routed)
        assert torch.equal(logits(own, twin.forward), routed)
        assert handle.totals().prefills == 3
        # Without a cache each step has the picture before it, and must know where the prompt ends.
        tokens = [generate(tiny, [prompt(own)], use_cache=False).sequences for tiny in (own, Tiny(twin, own.grid))]
        assert torch.equal(*tokens)
        with pytest.raises(RerouteError, match="is a part of another model that is routed"):
            reroute.enable(twin, schedule=schedule(FEW))
    assert torch.equal(logits(own, twin), plain)


@pytest.mark.parametrize("how", ["one by one", "process-wide"])
def test_a_shallow_copy_can_be_routed_afterwards(own: Tiny, how: str) -> None:
    plain, kind = logits(own), type(own.model)
    with enable(own, FEW):
        routed = logits(own)
        twin = copy.copy(own.model)
    assert torch.equal(logits(own, twin), plain)
    reroute.enable(*([twin] if how == "one by one" else []), schedule=schedule(FEW))
    assert torch.equal(logits(own, twin), routed)
    handle = reroute.handle_of(twin)
    assert handle is not None
    assert handle.totals().prefills == 1
    reroute.disable()
    assert torch.equal(logits(own, twin), plain)
    assert type(twin) is kind
    assert "_reroute" not in vars(twin)


# --- methods that were bound while the model was routed -----------------------------------------------------------


def bound(tiny: Tiny) -> dict[str, Callable[[], Any]]:
    """Calls of methods that are bound now: pipelines and servers keep ``model.generate`` or ``forward``."""
    given, ids = tiny.inputs([prompt(tiny)]), tiny.inputs([tiny.prompt(1, 6)])["input_ids"]
    model, base, text, layer = tiny.model, tiny.model.model, decoder(tiny), decoder(tiny).layers[2]
    states = torch.ones(1, 6, 64)
    tables = text.rotary_emb(states, tiny.positions(tiny.prompt(1, 6)).unsqueeze(-2))
    call, forward, generates, prepare = (
        model.__call__,
        model.forward,
        model.generate,
        model.prepare_inputs_for_generation,
    )
    call_base, call_text, call_layer = base.__call__, text.__call__, layer.__call__
    return {
        "the model": lambda: call(**given).logits,
        "forward": lambda: forward(**given).logits,
        "generate": lambda: generates(**given, max_new_tokens=6, do_sample=False),
        "preparing inputs": lambda: torch.tensor(len(prepare(ids, attention_mask=torch.ones_like(ids)))),
        "the base model": lambda: call_base(**given).last_hidden_state,
        "the decoder": lambda: call_text(input_ids=ids).last_hidden_state,
        "a layer": lambda: call_layer(states, position_embeddings=tables),
    }


def test_bound_methods_outlive_routing(own: Tiny) -> None:
    """What was bound while a model was routed is plain when that is over, and routed when it is again."""
    plain = {name: call() for name, call in bound(own).items()}
    with enable(own, FEW):
        kept = bound(own)
        routed = {name: call() for name, call in kept.items()}
    for name, call in kept.items():
        assert torch.equal(call(), plain[name]), name
    with enable(own, FEW):
        for name, call in kept.items():
            assert torch.equal(call(), routed[name]), name
    differ = {name for name in plain if not torch.equal(plain[name], routed[name])}
    assert differ == {"the model", "forward", "generate", "the base model"}


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_of_accelerate_that_came_while_routed(own: Tiny, place: str) -> None:
    """It keeps the ``forward`` that it replaces, and puts that back as an attribute."""
    hooks = pytest.importorskip("accelerate.hooks")
    module, plain = PLACES[place](own.model), logits(own)
    with enable(own, FEW):
        routed = logits(own)
        hooks.add_hook_to_module(module, hooks.ModelHook())
        assert torch.equal(logits(own), routed)
    assert torch.equal(logits(own), plain)
    hooks.remove_hook_from_module(module)
    assert torch.equal(logits(own), plain)
    with enable(own, FEW) as handle:
        assert torch.equal(logits(own), routed)
        check(own, handle)
    assert torch.equal(logits(own), plain)


# --- classes that others put over ours ----------------------------------------------------------------------------


class Sharded:
    """FSDP2 makes a module an instance of a subclass with this in front, too."""

    def reshard(self) -> str:
        return "resharded"


def shard(module: nn.Module) -> None:
    module.__class__ = type(f"FSDP{type(module).__name__}", (Sharded, type(module)), {})


def intercepted(tiny: Tiny) -> list[nn.Module]:
    return [tiny.model, tiny.model.model, decoder(tiny), *decoder(tiny).layers]


def test_a_model_that_is_sharded_while_routed(own: Tiny) -> None:
    """Their class stays; ours does nothing any more, and can be used again."""
    plain = logits(own)
    names = [type(module).__name__ for module in intercepted(own)]
    handle = enable(own, FEW)
    routed = logits(own)
    for module in intercepted(own):
        shard(module)
    for _ in range(2):
        assert torch.equal(logits(own), routed)
        check(own, handle)
        handle.disable()
        assert torch.equal(logits(own), plain)
        for module, name in zip(intercepted(own), names, strict=True):
            assert type(module).__name__ == f"FSDP{name}"
            assert getattr(module, "reshard")() == "resharded"  # noqa: B009
            assert "_reroute" not in vars(module)
        handle = enable(own, FEW)


def test_a_model_that_was_sharded_before(own: Tiny) -> None:
    for module in intercepted(own):
        shard(module)
    before, kinds = snapshot(own.model), classes(own.model)
    with enable(own, FEW) as handle:
        check(own, handle)
        assert all(isinstance(module, Sharded) for module in intercepted(own))
    assert classes(own.model) == kinds
    assert snapshot(own.model).keys() == before.keys()


def test_a_sharded_model_and_process_wide_routing(own: Tiny) -> None:
    """What is left of ours does not look like routing that is on."""
    plain = logits(own)
    with enable(own, FEW):
        routed = logits(own)
        for module in intercepted(own):
            shard(module)
    assert reroute.handle_of(own.model) is None
    reroute.enable(schedule=schedule(FEW))
    assert torch.equal(logits(own), routed)
    handle = reroute.handle_of(own.model)
    assert handle is not None
    assert handle.totals().prefills == 1
    reroute.disable()
    assert torch.equal(logits(own), plain)
    given = {**own.inputs([prompt(own)]), "max_new_tokens": 2, "do_sample": False}
    tokens = own.model.generate(**given)
    reroute.enable(keep=1.0)
    assert torch.equal(own.model.generate(**given), tokens)
