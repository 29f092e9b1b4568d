"""What a graph has baked in of its decoder is watched; kernels that others have bound to modules are a part of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from types import MethodType
from typing import Any

import models
import pytest
import torch
from models import Sample, Tiny
from oracle import Rules
from replays import capture, eagerly, replayed, route, same_outputs
from support import RULES, close
from tape import Tape
from torch import Tensor, nn

from reroute.graphs import Arena

DENSE = Rules((2,), (1.0,))


def prompts(tiny: Tiny) -> tuple[Sample, Sample]:
    """Of one class."""
    return tiny.prompt(40, 2, tiny.grid, 3), tiny.prompt(41, 3, tiny.grid, 4)


def test_a_decoder_that_changes_is_captured_anew(tapes: list[Tape]) -> None:
    tiny = models.llava()
    sample, new = prompts(tiny)
    inputs = tiny.inputs([new])
    text: Any = tiny.model.model.language_model
    with route(tiny, RULES[0]) as handle:
        capture(tiny, [sample])
        changes: tuple[Callable[[], Any], ...] = (
            lambda: text.layers[3].mlp.down_proj.weight.data.mul_(0.5),  # in place: read where it is
            lambda: setattr(text.layers[3].mlp.down_proj.weight, "data", text.layers[3].mlp.down_proj.weight * 0.5),
            lambda: setattr(text.layers[1].self_attn, "scaling", 0.1),
            lambda: setattr(text, "norm", models.llava(seed=9).model.model.language_model.norm),
        )
        for change, recorded in zip(changes, (1, 2, 3, 4), strict=True):
            change()
            outputs = [tiny.model(**inputs) for _ in range(2)]
            assert handle.stats().graph.is_replayed
            assert len(tapes) == recorded
            expected = eagerly(tiny, handle, inputs)
            for output in outputs:
                close(output.logits, expected)
        called: list[Any] = []
        hook = text.layers[2].register_forward_hook(lambda *_: called.append(None))
        tiny.model(**inputs)
        assert "have hooks" in handle.stats().graph.why
        assert len(called) == 1
        hook.remove()
        for _ in range(2):
            tiny.model(**inputs)
        assert handle.stats().graph.is_replayed


@pytest.mark.usefixtures("tapes")
def test_a_graph_whose_weights_have_moved_is_never_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies at their old addresses may be gone. All else is compared later, and held until the device is done."""
    tiny = models.llava()
    sample, new = prompts(tiny)
    inputs, launched = tiny.inputs([new]), list[str]()
    projection: Any = tiny.model.model.language_model.layers[3].mlp.down_proj
    with route(tiny, RULES[0]) as handle:
        capture(tiny, [sample])
        (graph,) = handle._router._replays._store._held.values()
        replay = graph._replay

        def launch() -> None:
            launched.append("it was")
            replay()

        graph._replay = launch
        replayed(handle, tiny, inputs)
        assert len(launched) == 1
        projection.weight.data = projection.weight * 0.5
        output = tiny.model(**inputs)
        assert not handle.stats().graph.is_replayed
        assert len(launched) == 1
        close(output.logits, eagerly(tiny, handle, inputs))
        tiny.model(**inputs)
        store, held = handle._router._replays._store, []
        monkeypatch.setattr(Arena, "wait", lambda self: held.append(len(store)))
        tiny.model.model.language_model.layers[1].self_attn.scaling = 0.1
        tiny.model(**inputs)
        assert not handle.stats().graph.is_replayed
        assert (held, len(store)) == ([1], 0)


def fused_norm(self: Any, states: Tensor) -> Tensor:
    """As a library of kernels binds it to each norm: other code, the same result but for rounding."""
    mean = torch.linalg.vector_norm(states, dim=-1, keepdim=True).square() / states.shape[-1]
    normed: Tensor = states * torch.rsqrt(mean + self.variance_epsilon) * self.weight
    return normed


def fused_gate(self: Any, states: Tensor) -> Tensor:
    """The same of each MLP."""
    both = torch.nn.functional.linear(states, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
    gate, up = both.chunk(2, dim=-1)
    down: Tensor = self.down_proj(torch.nn.functional.silu(gate) * up)
    return down


def with_kernels(tiny: Tiny) -> Tiny:
    model = copy.deepcopy(tiny.model)
    for module in model.model.language_model.modules():
        kind = type(module).__name__
        if kind.endswith(("RMSNorm", "MLP")):
            module.forward = MethodType(fused_norm if kind.endswith("Norm") else fused_gate, module)
    return Tiny(model, tiny.grid)


@pytest.mark.parametrize("name", ["llava-gqa", "qwen"])
@pytest.mark.parametrize("rules", [RULES[0], DENSE])
def test_kernels_of_a_library_are_recorded(name: str, rules: Rules, tapes: list[Tape]) -> None:
    tiny = with_kernels(models.tiny(name))
    sample, new = prompts(tiny)
    inputs = tiny.inputs([new])
    with route(tiny, rules, graphs=False):
        eager = tiny.model(**inputs)
    with route(tiny, rules) as handle:
        capture(tiny, [sample])
        output = replayed(handle, tiny, inputs)
    same_outputs(output, eager, inputs["attention_mask"].bool())
    (tape,) = tapes
    norms = [name for name, *_ in tape.signature if "vector_norm" in str(name)]
    assert len(norms) >= 2 * len(tiny.model.model.language_model.layers) + 1


def test_other_kernels_are_captured_anew(tapes: list[Tape]) -> None:
    tiny = models.llava()
    sample, new = prompts(tiny)
    inputs = tiny.inputs([new])
    norm: Any = tiny.model.model.language_model.norm

    def halved(self: Any, states: Tensor) -> Tensor:
        half: Tensor = 0.5 * states * self.weight
        return half

    with route(tiny, RULES[0]) as handle:
        capture(tiny, [sample])
        for recorded, kernel in enumerate((fused_norm, halved), start=2):
            norm.forward = MethodType(kernel, norm)
            for _ in range(2):
                output = tiny.model(**inputs)
            assert handle.stats().graph.is_replayed
            assert len(tapes) == recorded
            close(output.logits, eagerly(tiny, handle, inputs))
        del norm.forward
        for _ in range(2):
            output = tiny.model(**inputs)
        assert len(tapes) == 4
        close(output.logits, eagerly(tiny, handle, inputs))


def why_eager(tiny: Tiny) -> str:
    """What is said of the third of three prompts that are alike."""
    with route(tiny, RULES[0]) as handle:
        for _ in range(3):
            tiny.model(**tiny.inputs([prompts(tiny)[0]]))
        return str(handle.stats().graph.why)


def _spy(module: nn.Module, seen: list[Tensor]) -> Any:
    def forward(self: Any, states: Tensor) -> Any:
        seen.append(states)
        return type(self).forward(self, states)

    return MethodType(forward, module)


def _wrapper(module: nn.Module, seen: list[Tensor]) -> Any:
    own = module.forward

    @wraps(own)
    def forward(states: Tensor) -> Any:
        seen.append(states)
        return own(states)

    return forward


def _partial(module: nn.Module, seen: list[Tensor]) -> Any:
    return partial(_wrapper(module, seen))


@pytest.mark.parametrize("others", [_spy, _wrapper, _partial])
def test_what_looks_at_a_module_runs_eagerly(others: Callable[..., Any], tapes: list[Tape]) -> None:
    """A replay would show it nothing."""
    tiny, seen = models.llava(), list[Tensor]()
    norm: Any = tiny.model.model.language_model.layers[5].post_attention_layernorm
    norm.forward = others(norm, seen)
    assert "have hooks or wrappers" in why_eager(tiny)
    assert len(seen) == 3
    assert not tapes


def test_a_kernel_that_reads_on_the_host_runs_eagerly(tapes: list[Tape]) -> None:
    tiny = models.llava()

    def scaled(self: Any, states: Tensor) -> Tensor:
        by_largest: Tensor = states / states.abs().max().item() * self.weight
        return by_largest

    norm: Any = tiny.model.model.language_model.layers[5].post_attention_layernorm
    norm.forward = MethodType(scaled, norm)
    assert "LlamaRMSNorm read values on the host" in why_eager(tiny)
    assert not tapes
