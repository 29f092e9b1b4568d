"""Prefills by graphs of decoders whose layers slide, get rotary tables or masks of their own, or have experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from dense import near
from models import CACHE
from pictured import Pictured, Prompt
from tape import Tape
from test_replayed_pictures import GRAPHS, captured, family_of, replayed, same, with_sdpa
from test_types import ONE, TWO, batch, plan, prompt, step
from tiny_types import PICTURE, RECURRENT, TYPES, TinyType, build
from torch import Tensor
from transformers import DynamicCache

import reroute
from reroute.transformers.adapters.kinds import LayerKinds
from reroute.transformers.cache import states_in
from reroute.transformers.graphs import forwards, masks, replays

SEEN = prompt(9, 2, 7, 2, 2, 3), prompt(10, 2, 7, 2, 2, 4)
SLIDING = ("cohere2_vision", "exaone4_5", "cohere_compass", "muse_glimmer", "idefics2", "llama4")
EXPERTS = ("qwen3_vl_moe", "glm4v_moe", "kimi_k25")
OTHERS = ("gemma4", "gemma4_unified", "paligemma", "molmo2")
QUICK = ("cohere2_vision", "muse_glimmer", "qwen3_vl_moe", "qwen3_5", "lfm2_vl", "paligemma")
KINDS = [
    pytest.param(kind, marks=[] if kind in QUICK else [pytest.mark.slow])
    for kind in (*SLIDING, *EXPERTS, *RECURRENT, *OTHERS)
    if kind in TYPES
]

pytestmark = pytest.mark.usefixtures("_without_gradients")


def settings_of(kind: str, action: Any = "route") -> dict[str, Any]:
    """One decision before the first layer that may decide, behind features between layers; one more if there can be."""
    from reroute.rankers import LastTokenAttention
    from reroute.transformers import adapter_of

    adapter, ranker = adapter_of(build(kind).model), LastTokenAttention()
    layers = [i for i in range(max(1, adapter.first_layer), len(adapter.layers)) if adapter.may_decide(i, ranker)][:2]
    return {"schedule": reroute.Schedule(tuple(layers), (0.6, 0.3)[: len(layers)]), "action": action}


def run(handle: Any, tiny: TinyType, *prompts: list[int]) -> tuple[Any, Tensor]:
    """The output of a prefill, its cache copied, and the logits of three tokens after it."""
    given = batch(tiny, *prompts)
    cache: Any = DynamicCache(config=tiny.text.config)
    with handle.using(plan(handle, given)):
        output = tiny.model(**given, **{CACHE: cache}, use_cache=True)
    use, after = handle.stats().graph, []
    assert use is None or use.is_replayed or "first prompt of its class" in use.why, use
    kept = [_held(its) for its in cache.layers]
    for token in (7, 11, 13):
        inputs = step(tiny, given, token, cache)
        after.append(tiny.model(**inputs, use_cache=True).logits[:, -1])
        given = {name: inputs[name] for name in ("attention_mask", "position_ids")}
    output.kept = kept
    return output, torch.stack(after)


def _held(layer: Any) -> tuple[int, list[Tensor]]:
    """How many tokens it has seen, if it knows, and copies of what it holds."""
    if hasattr(layer, "conv_states"):
        return 0, [its.clone() for its in states_in(layer).values()]
    if getattr(layer, "keys", None) is None:
        return 0, []
    return layer.get_seq_length(), [layer.keys.clone(), layer.values.clone()]


def compared(tiny: TinyType, prompts: list[list[int]], seen: list[list[int]], **settings: Any) -> None:
    """``prompts`` by a graph that was captured with ``seen`` ones, beside eager prefills."""
    with reroute.enable(tiny.model, **settings) as handle:
        eager, expected = run(handle, tiny, *prompts)
    with reroute.enable(tiny.model, graphs=GRAPHS, **settings) as handle:
        for _ in range(2):
            run(handle, tiny, *seen)
        mine, after = run(handle, tiny, *prompts)
        assert handle.totals().prefills == 3
    valid = batch(tiny, *prompts)["attention_mask"].bool()
    near(mine.logits[valid], eager.logits[valid])
    near(after, expected)
    for its, other in zip(mine.kept, eager.kept, strict=True):
        assert its[0] == other[0]
        for states, others in zip(its[1], other[1], strict=True):
            assert states.shape == others.shape
            assert states.isfinite().all()
            if not its[0]:  # a state, in which no filler is left
                near(states, others)


@pytest.mark.usefixtures("tapes", "_planned")
@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("kind", KINDS)
def test_types(kind: str, action: Any) -> None:
    """One prompt and a padded batch, both longer than windows."""
    tiny = with_sdpa(build(kind, "sdpa"))
    for prompts in ([ONE], [ONE, TWO]):
        compared(tiny, prompts, list(SEEN[: len(prompts)]), **settings_of(kind, action))


@pytest.mark.usefixtures("tapes", "_planned")
@pytest.mark.parametrize("kind", ["cohere2_vision", "muse_glimmer"])
def test_windows_that_are_longer_than_prompts(kind: str) -> None:
    """No mask is needed then. With a longer prompt some are, and it has a graph of its own."""
    tiny = with_sdpa(build(kind, "sdpa"))
    tiny.text.config.sliding_window = window = 24
    for layer in tiny.layers:
        if getattr(layer.self_attn, "sliding_window", None) is not None:
            layer.self_attn.sliding_window = window
    compared(tiny, [ONE, TWO], list(SEEN), **settings_of(kind))
    long = prompt(3, 9, 8, 9)
    with reroute.enable(tiny.model, **settings_of(kind)) as handle:
        eager = [run(handle, tiny, ids) for ids in (ONE, long)]
    with reroute.enable(tiny.model, graphs=GRAPHS, **settings_of(kind)) as handle:
        for ids in (ONE, ONE, long, long):
            run(handle, tiny, ids)
        assert handle.stats().graph.graphs == 2
        for ids, (output, after) in zip((ONE, long), eager, strict=True):
            mine, its = run(handle, tiny, ids)
            near(mine.logits, output.logits)
            near(its, after)


def whole(seed: int) -> list[int]:
    return prompt(seed, 40, 128, 24)


@pytest.mark.usefixtures("tapes", "_planned")
@pytest.mark.parametrize("kind", ["cohere2_vision", "muse_glimmer", "qwen3_vl_moe", "qwen3_5", "lfm2_vl"])
def test_without_fillers_bit_for_bit(kind: str) -> None:
    """192 rows, and 128 in the stage."""
    tiny = with_sdpa(build(kind, "sdpa"))
    first = settings_of(kind)["schedule"].layers[0]
    for settings in ({"schedule": reroute.Schedule((first,), (0.5,))}, {"keep": 1.0}):
        with reroute.enable(tiny.model, **settings) as handle:
            eager, expected = run(handle, tiny, whole(1))
        with reroute.enable(tiny.model, graphs=GRAPHS, **settings) as handle:
            for _ in range(2):
                run(handle, tiny, whole(2))
            mine, after = run(handle, tiny, whole(1))
            assert handle.stats().graph.waste is None or handle.stats().graph.waste.flops == 0
        assert torch.equal(mine.logits, eager.logits)
        assert torch.equal(after, expected)
        for its, other in zip(mine.kept, eager.kept, strict=True):
            assert all(map(torch.equal, its[1], other[1]))


# --- masks that are given ---------------------------------------------------------------------------------------------


def family() -> Pictured:
    """Gemma 3: pictures see themselves both ways, and the model makes masks for its decoder."""
    return family_of("gemma3")


GIVEN: dict[str, Any] = {"schedule": reroute.Schedule((2, 4), (0.5, 0.3))}


def prompts_of(its: Pictured, seen: bool, count: int) -> list[Prompt]:
    parts = ((4, 3, 5), (1, 2, 4)) if seen else ((2, 6, 2), (5, 1, 5))
    return [its.prompt(*each) for each in parts[:count]]


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize("settings", [{**GIVEN, "action": "route"}, {**GIVEN, "action": "remove"}, {"keep": 1.0}])
def test_pictures_that_see_both_ways(settings: dict[str, Any]) -> None:
    gemma, generated = family(), []
    for count in (1, 2):
        inputs = gemma.inputs(prompts_of(gemma, False, count))
        given = {"do_sample": False, "max_new_tokens": 4, "output_logits": True, "return_dict_in_generate": True}
        with reroute.enable(gemma.tiny.model, **settings):
            eager = gemma.tiny.model(**inputs, use_cache=True)
            generated = [gemma.tiny.model.generate(**inputs, **given)]
        with captured(gemma, prompts_of(gemma, True, count), **settings) as handle:
            same(replayed(handle, gemma, inputs), eager, inputs["attention_mask"].bool())
            generated.append(gemma.tiny.model.generate(**inputs, **given))
        assert torch.equal(*(its.sequences for its in generated))
        near(*(torch.stack(its.logits) for its in generated))


def test_two_recordings_with_masks_are_one(tapes: list[Tape]) -> None:
    """What may be seen is no part of a graph."""
    gemma = family()
    for seen in (True, False):
        with captured(gemma, prompts_of(gemma, seen, 2), **GIVEN):
            pass
    first, second = tapes
    assert first.signature == second.signature


@pytest.mark.skipif("molmo2" not in TYPES, reason="this release of Transformers does not have it")
@pytest.mark.usefixtures("tapes", "_planned")
@pytest.mark.parametrize("count", [1, 2])
def test_one_mask_for_all_layers(count: int) -> None:
    """Told the kinds of tokens, Molmo 2 makes it: pictures see themselves both ways."""
    tiny, settings, logits = with_sdpa(build("molmo2", "sdpa")), settings_of("molmo2"), []
    new, seen = [ONE, TWO][:count], SEEN[:count]
    plain = tiny.model(**batch(tiny, *new)).logits
    for graphs in (False, GRAPHS):
        with reroute.enable(tiny.model, graphs=graphs, **settings) as handle:
            for prompts in (seen, seen, new):
                given = batch(tiny, *prompts)
                with handle.using(plan(handle, given)):
                    output = tiny.model(**given, mm_token_type_ids=(given["input_ids"] == PICTURE).long())
            assert not graphs or handle.stats().graph.is_replayed, handle.stats().graph
            logits.append(output.logits[given["attention_mask"].bool()])
    near(logits[1], logits[0])
    assert differs(logits[0], plain[given["attention_mask"].bool()])


@pytest.mark.usefixtures("tapes", "_planned")
def test_fillers_are_hidden_where_all_tokens_see_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails if they are not."""
    tiny = with_sdpa(build("paligemma", "sdpa"))
    monkeypatch.setattr(LayerKinds, "sees_later", frozenset({False}))
    with pytest.raises(AssertionError):
        compared(tiny, [ONE], list(SEEN[:1]), **settings_of("paligemma"))


# --- what each part is for --------------------------------------------------------------------------------------------


def differs(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() > 1e-3)


@pytest.mark.usefixtures("tapes")
def test_masks_of_the_prompt_before_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    gemma = family()
    inputs = gemma.inputs(prompts_of(gemma, False, 1))
    with reroute.enable(gemma.tiny.model, **GIVEN):
        eager = gemma.tiny.model(**inputs, use_cache=True)
    with captured(gemma, prompts_of(gemma, True, 1), **GIVEN) as handle:
        monkeypatch.setattr(masks.GivenMasks, "fill", lambda *_: None)
        assert differs(replayed(handle, gemma, inputs).logits, eager.logits)


def _no_window(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(replays.Replays, "_masked", lambda *_: frozenset())


def _logical_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(forwards.RoutedInGraph, "_given_rows", lambda self, prefill: prefill.positions)


@pytest.mark.usefixtures("tapes", "_planned")
@pytest.mark.parametrize(("kind", "spoil"), [("cohere2_vision", _no_window), ("muse_glimmer", _logical_rows)])
def test_windows_and_tables_in_a_graph_are_those_of_its_rows(
    kind: str, spoil: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison fails if they are not."""
    tiny = with_sdpa(build(kind, "sdpa"))
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        compared(tiny, [ONE, TWO], list(SEEN), **settings_of(kind))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.usefixtures("_planned")
def test_experts_that_loop_run_eagerly(implementation: str, tapes: list[Tape]) -> None:
    tiny = with_sdpa(build("qwen3_vl_moe", "sdpa"))
    tiny.model.set_experts_implementation(implementation)
    given = batch(tiny, ONE)
    with reroute.enable(tiny.model, graphs=GRAPHS, **settings_of("qwen3_vl_moe")) as handle:
        for _ in range(2):
            with handle.using(plan(handle, given)):
                tiny.model(**given)
        graph = handle.stats().graph
    assert graph.is_replayed == (implementation != "eager")
    assert ("Experts read values on the host" in graph.why) == (implementation == "eager")
    assert len(tapes) == (implementation != "eager")
