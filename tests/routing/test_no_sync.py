"""Once the plan is made the host never waits for the device, and no shape depends on data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import pytest
import torch
from models import CACHE, Tiny
from oracle import Rules
from support import RULES, NoWaiting, cache_of, enable, kv_lengths, never_waits, schedule
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import reroute
from reroute.transformers import ModelAdapter
from reroute.transformers.context import RoutedPrefill
from reroute.transformers.decoding import RoutedDecode


@pytest.mark.parametrize("rules", [*RULES, Rules((2, 4), (0.5, 0.3), "remove", score_layer_offset=-1)])
@pytest.mark.parametrize("name", ["llava-mha", "llava-gqa"])
def test_fake_tensors(name: str, rules: Rules) -> None:
    """Fake tensors have no data: whoever asks for it raises."""
    real = models.tiny(name)
    samples = [real.prompt(0, 5, real.grid, 4), real.prompt(1, 2, real.grid, 3, real.grid, 2)]
    with enable(real, rules) as handle:
        given = real.inputs(samples)
        plan = handle.plan(given["input_ids"], given["attention_mask"])
        expected = kv_lengths(cache_of(real.model(**given, use_cache=True)))
    embeds = [real.embeds(sample).shape for sample in samples]
    length = max(shape[0] for shape in embeds)
    with FakeTensorMode():
        fake = models.BUILDERS[name]()
        with enable(fake, rules) as handle, handle.using(plan), torch.no_grad():
            # Pictures are merged by Transformers, with a wait of its own: start behind that.
            output = fake.model(inputs_embeds=torch.empty(len(samples), length, 64), use_cache=True)
    assert output.logits.shape[:2] == (2, length)
    assert kv_lengths(getattr(output, CACHE)) == expected
    assert handle.stats().prefills == 1


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs all that routing does at a layer and at the decoder's end under ``NoWaiting``, and lists what ran.

    Transformers itself waits when it makes a mask, so the whole forward cannot be guarded.
    """
    return never_waits(monkeypatch, ["before_layer", "after_layer", "after_decoder"], RoutedPrefill, RoutedDecode)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_operation_waits(tiny: Tiny, rules: Rules, attention: str, guarded: list[str]) -> None:
    """Decisions and all, in a batch with fillers, and in a decoding step."""
    tiny.model.set_attn_implementation(attention)
    try:
        samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2)]
        given = tiny.inputs(samples)
        with enable(tiny, rules) as handle:
            output = tiny.model(**given, use_cache=True, output_hidden_states=True)
            assert handle.stats().prefills == 1
            assert guarded.count("before_layer") == tiny.num_layers
            assert (guarded.count("after_layer"), guarded.count("after_decoder")) == (tiny.num_layers, 1)
            tiny.model(**tiny.follow(samples, [models.text(3), models.text(4)]), **{CACHE: cache_of(output)})
            assert guarded.count("before_layer") == 2 * tiny.num_layers
    finally:
        tiny.model.set_attn_implementation("sdpa")


KERNELS = ("defer", "admit", "defer_rmsnorm", "score_topk")


class Counting(TorchDispatchMode):
    """Lists the operations that would launch something on a GPU."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("texts", "adapting"),
    [
        ((5,), 0),
        ((5, 5), 0),
        ((5, 9), 6),  # padding: the mask of the stage is picked from the model's
    ],
)
def test_a_decision_adds_nothing_to_the_kernels(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, texts: tuple[int, ...], adapting: int
) -> None:
    """A step is the kernels and the projection of the model, where no mask has to be adapted."""
    counted: dict[int, list[str]] = {}
    before = RoutedPrefill.before_layer

    def count(forward: Any, index: int, *args: Any) -> Any:
        with Counting() as counting:
            result = before(forward, index, *args)
        counted[index] = counting.names
        return result

    def uncounted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with _disable_current_modes():
                return function(*args, **kwargs)

        return run

    monkeypatch.setattr(RoutedPrefill, "before_layer", count)
    monkeypatch.setattr(ModelAdapter, "project_own", uncounted(ModelAdapter.project_own))
    with reroute.enable(tiny.model, schedule=schedule(RULES[0])) as handle, torch.no_grad():
        kernels = {name: uncounted(getattr(handle.backend, name)) for name in KERNELS}
        handle.backend = replace(handle.backend, **kernels)
        tiny.model(**tiny.inputs([tiny.prompt(sample, text, tiny.grid, 4) for sample, text in enumerate(texts)]))
    assert [len(counted[layer]) for layer in (3, 4, 5, 6)] == [0, adapting, 0, adapting]


def test_the_test_can_fail() -> None:
    with NoWaiting():
        for wait in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: torch.zeros(1)[x > 0]):
            with pytest.raises(AssertionError):
                wait(torch.ones(1))
