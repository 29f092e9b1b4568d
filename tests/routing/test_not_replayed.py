"""What runs eagerly although graphs are on: right as ever, and ``stats().graph`` says why."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import models
import pytest
import torch
from attentions import FLASH, FLEX, attention_of
from models import CACHE, Tiny
from oracle import Rules
from replays import GRAPHS, capture, replayed, route, same_outputs
from support import RULES, NoWaiting, cache_of, close, labels_after
from tape import Tape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import reroute
from reroute import Schedule
from reroute.errors import RerouteError
from reroute.rankers import Diversity, RandomScores
from reroute_kernels.recorder import CannotRecordNow

DENSE = Rules((2,), (1.0,))

Setting = dict[str, Any]


def inputs_of(tiny: Tiny, seed: int = 0) -> dict[str, Tensor]:
    return tiny.inputs([tiny.prompt(seed, 5, tiny.grid, 4)])


def why(
    tiny: Tiny, inputs: dict[str, Any], inside: Callable[[], AbstractContextManager[Any]] = nullcontext, **given: Any
) -> str:
    """Of a call that is no different from one that is replayed but for what is given. Its output is the eager one."""
    settings = {"rules": RULES[0], **given}
    rules = settings.pop("rules")
    with route(tiny, rules, graphs=False, **settings), inside():
        expected = tiny.model(**inputs)
    with route(tiny, rules, **settings) as handle, inside():
        for _ in range(3):
            output = tiny.model(**inputs)
        graph = handle.stats().graph
    close(output.logits, expected.logits)
    assert not graph.is_replayed
    assert graph.graphs == 0
    assert graph.why
    return str(graph.why)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"trace": True}, "trace=True"),
        ({"reopens": True}, "reopens=True"),
        ({"ranker": RandomScores()}, "RandomScores ranks by counts that the host has"),
        ({"ranker": Diversity()}, "Diversity ranks by counts that the host has"),
    ],
)
def test_settings(tapes: list[Tape], settings: Setting, expected: str) -> None:
    tiny = models.tiny("llava-gqa")
    assert expected in why(tiny, inputs_of(tiny), **settings)
    assert not tapes


def test_calls(tiny: Tiny, tapes: list[Tape]) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    inputs = inputs_of(tiny)
    assert "it has labels" in why(tiny, {**inputs, "labels": labels_after(sample, len(sample) - 2)})
    assert "output_hidden_states" in why(tiny, {**inputs, "output_hidden_states": True})
    assert "not plain ones, or a dispatch mode" in why(tiny, inputs, Watching)
    assert "it has labels" in why(tiny, {**inputs, "labels": labels_after(sample, len(sample) - 2)}, rules=DENSE)
    assert not tapes


class Watching(TorchDispatchMode):
    """Looks at operations."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_gradients(tapes: list[Tape]) -> None:
    tiny = models.llava()
    tiny.model.requires_grad_(True)
    with torch.enable_grad():
        assert "gradients are recorded" in why(tiny, inputs_of(tiny))
    assert not tapes


class OtherCache(DynamicCache):
    """Of which nothing is known."""


def test_later_turns_and_other_caches(tiny: Tiny, tapes: list[Tape]) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    new = tiny.prompt(1, tiny.grid, 5)
    with route(tiny, DENSE) as handle:
        for _ in range(3):
            cache = cache_of(tiny.model(**tiny.inputs([sample])))
            tiny.model(**tiny.follow([sample], [new]), **{CACHE: cache})
            assert "it is a later turn" in handle.stats().graph.why
        config = tiny.model.config.get_text_config()
        for _ in range(2):
            tiny.model(**tiny.inputs([sample], positions=True), **{CACHE: OtherCache(config=config)})
            assert "not an empty DynamicCache or StaticCache" in handle.stats().graph.why
    assert len(tapes) == 1  # of the first turn


def test_plans_that_were_made_ahead(tiny: Tiny, tapes: list[Tape]) -> None:
    inputs = inputs_of(tiny)
    with route(tiny, RULES[0]) as handle:
        plan = handle.plan(inputs["input_ids"])
        for _ in range(3):
            with handle.using(plan):
                tiny.model(**inputs)
            assert "handle.using" in handle.stats().graph.why
    assert not tapes


def test_packed_rows_and_masks_of_ones_own_with_keep_one(tapes: list[Tape]) -> None:
    """Of routed prefills the planner refuses them."""
    tiny = models.tiny("llava-gqa")
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    inputs = inputs_of(tiny)
    packed = {**inputs, "position_ids": torch.tensor([[*range(20), *range(len(sample) - 20)]])}
    del packed["attention_mask"]
    assert "packed in one row" in why(tiny, packed, rules=DENSE)
    length = len(sample)
    added = torch.zeros(1, 1, length, length)
    assert "a mask of its own" in why(tiny, {**inputs, "attention_mask": added}, rules=DENSE)
    short = {**inputs, "position_ids": torch.arange(length, dtype=torch.int32)[None]}
    assert "position ids are not of the form" in why(tiny, short, rules=DENSE)
    assert not tapes


def mutated(tiny: Tiny, change: Callable[[Any], None]) -> Tiny:
    model = copy.deepcopy(tiny.model)
    change(model)
    return Tiny(model, tiny.grid)


def _hooked(model: Any) -> None:
    model.model.language_model.layers[3].self_attn.q_proj.register_forward_hook(lambda *_: None)


def _training(model: Any) -> None:
    model.train()


def _compiled(model: Any) -> None:
    model.model.language_model.layers[4].mlp.compile(backend="eager")


def _reading(model: Any) -> None:
    class Reads(type(model.model.language_model.layers[1].mlp)):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            assert x.sum().item() == x.sum().item()
            return super().forward(x)  # type: ignore[no-any-return]

    model.model.language_model.layers[1].mlp.__class__ = Reads


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_hooked, "have hooks"),
        (_compiled, "are compiled"),
        (_training, "training mode"),
        (_reading, "Reads read values on the host"),
    ],
)
@pytest.mark.parametrize("rules", [RULES[0], DENSE])
def test_models(tapes: list[Tape], change: Any, expected: str, rules: Rules) -> None:
    tiny = mutated(models.tiny("llava-gqa"), change)
    assert expected in why(tiny, inputs_of(tiny), rules=rules)
    assert not tapes


def test_rotary_tables_by_the_largest_position(tapes: list[Tape]) -> None:
    tiny = models.llava()
    config = tiny.model.config.get_text_config()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    kind = type(tiny.model.model.language_model.rotary_emb)
    tiny.model.model.language_model.rotary_emb = kind(config).eval()
    assert "largest position (dynamic)" in why(tiny, inputs_of(tiny))
    assert not tapes


def test_attention_that_needs_masks(tiny: Tiny, tapes: list[Tape]) -> None:
    with attention_of(tiny, "eager"):
        assert "eager attention needs a mask" in why(tiny, inputs_of(tiny))
    with attention_of(tiny, FLEX):  # which sees everything without one
        assert "flex attention needs a mask" in why(tiny, inputs_of(tiny))
    assert not tapes


def test_layers_that_see_later_tokens_or_are_not_known(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    from reroute.transformers import ModelAdapter

    tiny = models.tiny("llava-gqa")
    with monkeypatch.context() as patch:
        patch.setattr(ModelAdapter, "sees_only_before", lambda self, layer: layer != 3)
        assert "layers [3] see later tokens" in why(tiny, inputs_of(tiny), rules=DENSE)
    with monkeypatch.context() as patch:
        patch.setattr(ModelAdapter, "keeps_prompt", lambda self, layer: layer == 1)
        assert "layers [1] keep the first prompt apart" in why(tiny, inputs_of(tiny), rules=DENSE)
    assert not tapes


def test_flash_attention_looks_at_nothing(tiny: Tiny, tapes: list[Tape]) -> None:
    """It would look at position ids on the host, in every layer that gets some: layers in a graph get none.

    The stand-in attends where flash attention does; under ``NoWaiting`` a graph that reads something fails.
    """
    inputs = inputs_of(tiny, 3)
    with attention_of(tiny, FLASH):
        with route(tiny, RULES[0], graphs=False):
            eager = tiny.model(**inputs)
        with route(tiny, RULES[0]) as handle, pytest.MonkeyPatch.context() as patch:
            _record_without_waiting(patch)
            capture(tiny, [tiny.prompt(0, 2, tiny.grid, 7)])
            output = replayed(handle, tiny, inputs)
    same_outputs(output, eager, inputs["attention_mask"].bool())
    assert len(tapes) == 1


def _record_without_waiting(patch: pytest.MonkeyPatch) -> None:
    from tape_recorder import TapeRecorder

    record = TapeRecorder.record

    def watched(self: TapeRecorder, run: Callable[[], None]) -> Callable[[], None]:
        with NoWaiting():
            return record(self, run)

    patch.setattr(TapeRecorder, "record", watched)


def test_a_graph_waits_for_nothing(tiny: Tiny, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    _record_without_waiting(monkeypatch)
    for rules in (*RULES, DENSE):
        with route(tiny, rules):
            capture(tiny, [tiny.prompt(0, 2, tiny.grid, 7)])
    assert len(tapes) == len(RULES) + 1


def test_what_is_not_on_cuda_is_refused() -> None:
    tiny = models.tiny("llava-gqa")
    with pytest.raises(RerouteError, match="the decoder is on cpu"):
        reroute.enable(tiny.model, keep=0.5, graphs=True)
    assert reroute.handle_of(tiny.model) is None


@pytest.mark.parametrize(
    ("error", "tries"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), 2),  # a smaller class may have room
        (RuntimeError("CUDA error: operation not permitted when stream is capturing"), 1),
        (CannotRecordNow("another capture runs"), 4),  # at each prompt, but for the first of a class
    ],
)
def test_a_capture_that_fails_is_not_tried_again(
    error: RuntimeError, tries: int, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tape_recorder import TapeRecorder

    tiny, tried = models.tiny("llava-gqa"), []

    def fail(self: TapeRecorder, run: Callable[[], None]) -> None:
        tried.append(run)
        raise error

    monkeypatch.setattr(TapeRecorder, "record", fail)
    with route(tiny, RULES[0]) as handle:
        for text in (4, 104):
            for _ in range(3):
                tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, text)]))
            assert f"its capture fails ({type(error).__name__}: {error})" in handle.stats().graph.why
    assert len(tried) == tries
    assert not tapes


def test_memory_that_a_capture_took_is_given_back(tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the eager prefill, for which there is room without graphs, lacks it too."""
    from tape_recorder import TapeRecorder

    tiny, taken, given_back = models.tiny("llava-gqa"), list[weakref.ref[Tensor]](), list[bool]()

    def fail(self: TapeRecorder, run: Callable[[], None]) -> None:
        activations = torch.zeros(3)
        taken.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    small, large = (tiny.inputs([tiny.prompt(0, 5, tiny.grid, text)]) for text in (4, 104))
    monkeypatch.setattr(TapeRecorder, "give_back", lambda self: given_back.append(taken[-1]() is None))
    with route(tiny, RULES[0]) as handle:
        capture(tiny, [tiny.prompt(0, 5, tiny.grid, 4)])
        with monkeypatch.context() as patch:
            patch.setattr(TapeRecorder, "rehearse", fail)
            for _ in range(2):
                tiny.model(**large)
        assert "its capture fails (OutOfMemoryError" in handle.stats().graph.why
        assert (handle.stats().graph.graphs, handle.stats().graph.nbytes) == (0, 0)
        assert given_back == [True]
        replayed(handle, tiny, small)  # captured anew
        tiny.model(**large)
        assert not handle.stats().graph.is_replayed
    assert len(tapes) == 2


class Unhashable(RandomScores):
    __hash__ = None  # type: ignore[assignment]


def test_rankers_without_a_hash(tapes: list[Tape]) -> None:
    tiny = models.tiny("llava-gqa")
    assert "has no hash" in why(tiny, inputs_of(tiny), ranker=Unhashable())
    assert not tapes


@contextmanager
def _global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def test_autocast(tapes: list[Tape]) -> None:
    tiny = models.tiny("llava-gqa")
    assert "autocast is on" in why(tiny, inputs_of(tiny), lambda: torch.autocast("cpu", torch.bfloat16))
    assert not tapes


def test_hooks_of_all_modules(tapes: list[Tape]) -> None:
    tiny = models.tiny("llava-gqa")
    assert "hooks for all modules" in why(tiny, inputs_of(tiny), _global_hook)
    assert not tapes


def test_settings_are_checked() -> None:
    for wrong in ({"max_graphs": 0}, {"max_graphs": "3"}, {"max_waste": -1}, {"max_waste": float("nan")}):
        with pytest.raises(RerouteError, match="max_"):
            reroute.Graphs(**wrong)
    with pytest.raises(RerouteError, match="graphs must be"):
        reroute.RoutingConfig(graphs=3)  # type: ignore[arg-type]
    config = reroute.RoutingConfig(schedule=Schedule((2,), (0.5,)), graphs=GRAPHS)
    assert reroute.RoutingConfig.from_json(config.to_json()) == config
    assert reroute.RoutingConfig(graphs=True) == reroute.RoutingConfig(graphs=reroute.Graphs())
