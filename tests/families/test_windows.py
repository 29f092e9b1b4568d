"""Types of which some layers slide, against the dense oracle: windows shorter than prompts, and long answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from dense import NEAR, near, predict
from models import CACHE
from pictured import PICTURED, Prompt
from test_types import ONE, TWO, batch, plan, prompt, step
from tiny_types import PICTURE, SLIDING, TYPES, WINDOW, TinyType, build, configuration
from torch import Tensor
from transformers import DynamicCache, masking_utils

import reroute
from reroute.errors import RerouteError, UnsupportedCacheError, UnsupportedModelError
from reroute.methods import PDrop
from reroute.rankers import LastTokenAttention, Norm

LAYERS = (2, 6)
TOKENS = (7, 11, 13, 17, 19, 23, 29, 31)
"""More than a window."""


def stored_rows(layer: Any) -> int:
    return int(layer.keys.shape[-2])


def decode(handle: Any, tiny: TinyType, *prompts: list[int]) -> tuple[Tensor, Tensor, Any]:
    """The logits of a prefill, those of ``TOKENS`` after it (T, B, V), and the cache."""
    given = batch(tiny, *prompts)
    cache = DynamicCache(config=tiny.text.config)
    with handle.using(handle.plan(given["input_ids"], given["attention_mask"])):
        logits, after = tiny.model(**given, **{CACHE: cache}, use_cache=True).logits, []
        for token in TOKENS:
            inputs = step(tiny, given, token, cache)
            after.append(tiny.model(**inputs, use_cache=True).logits[:, -1])
            given = {name: inputs[name] for name in ("attention_mask", "position_ids")}
    return logits, torch.stack(after), cache


WAYS = [("route", "sdpa"), ("route", "eager"), ("remove", "sdpa"), ("remove", "eager")]
ALIKE = ("shieldgemma2", "aya_vision")
"""Types whose decoder is one that another type has too: Gemma 3, Cohere 2."""
CASES = [
    pytest.param(kind, *way, marks=[pytest.mark.slow] * (kind in ALIKE or (kind != "gemma3" and way != WAYS[0])))
    for kind in SLIDING
    if kind in TYPES
    for way in WAYS
]


@torch.no_grad()
def check_against_oracle(kind: str, action: Any, attention: str, share: float = NEAR) -> None:
    """One prompt and a batch, with tokens after them: selections, logits; plain bits at ``keep=1`` and afterwards."""
    dense, tiny = build(kind, layers=8), build(kind, attention, layers=8)
    # Transformers' masks of windows of later tokens alone show padding, once there are more than a window of them.
    two = TWO if tiny.later is None else prompt(1, 2, 5, 1, 3, 4)
    ratios = (0.4, 0.7) if action == "route" else (0.7, 0.4)
    expected = [predict(dense, [*ids, *TOKENS], LAYERS, ratios, prompt=len(ids), action=action) for ids in (ONE, two)]
    plain = tiny.model(**batch(tiny, ONE, two), use_cache=False).logits
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, ratios), action=action, trace=True) as handle:
        for samples, wanted in (([ONE], expected[:1]), ([ONE, two], expected)):
            logits, after, _ = decode(handle, tiny, *samples)
            for b, (ids, one) in enumerate(zip(samples, wanted, strict=True)):
                assert one.margin > 1e-6
                assert [stage.kept[b].tolist() for stage in handle.trace] == one.kept
                near(logits[b, -len(ids) :], one.logits[: len(ids)], share=share)
                near(after[:, b], one.logits[len(ids) :], share=share)
        with handle.at(keep=1.0):
            assert torch.equal(tiny.model(**batch(tiny, ONE, two), use_cache=False).logits, plain)
    assert torch.equal(tiny.model(**batch(tiny, ONE, two), use_cache=False).logits, plain)


@pytest.mark.parametrize(("kind", "action", "attention"), CASES)
def test_a_sliding_type_against_the_oracle(kind: str, action: Any, attention: str) -> None:
    check_against_oracle(kind, action, attention)


@torch.no_grad()
def test_a_window_that_is_longer_than_the_conversation(monkeypatch: pytest.MonkeyPatch) -> None:
    """SDPA needs no mask then, for any layer, and tables still differ."""
    dense, tiny = build("gemma3", layers=8), build("gemma3", "sdpa", layers=8)
    for model in (dense, tiny):
        monkeypatch.setattr(model.text.config, "sliding_window", 64)
    expected = predict(dense, [*ONE, *TOKENS], LAYERS, (0.4, 0.7), prompt=len(ONE))
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        logits, after, _ = decode(handle, tiny, ONE)
    near(logits[0], expected.logits[: len(ONE)])
    near(after[:, 0], expected.logits[len(ONE) :])


@torch.no_grad()
def test_a_mask_that_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As may be for one token and a cache that has nothing but its window. A routed one has rows before it too."""
    kinds, tiny = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING, build("gemma3", "sdpa", layers=8)
    plain = kinds["sliding_attention"]

    def sparing(**given: Any) -> Any:
        return None if given["inputs_embeds"].shape[1] == 1 else plain(**given)

    answers = []
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        for function in (plain, sparing):
            monkeypatch.setitem(kinds, "sliding_attention", function)
            answers.append(decode(handle, tiny, ONE)[1])
    near(answers[1], answers[0])


# --- caches ---------------------------------------------------------------------------------------------------------


def talk(handle: Any, tiny: TinyType, cache: Any, turns: list[list[list[int]]], mask: Tensor | None = None) -> Tensor:
    """The logits (B, L, V) of all turns, each of one prompt per row, one after the other on ``cache``."""
    logits, length = [], 0
    mask = torch.ones(len(turns[0]), sum(len(turn[0]) for turn in turns), dtype=torch.long) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    for turn in turns:
        ids, end = torch.tensor(turn), length + len(turn[0])
        given = {"input_ids": ids, "attention_mask": mask[:, :end]}
        given["position_ids"] = tiny.spread(positions[:, length:end])
        if tiny.marks is not None:
            given[tiny.marks] = (ids == PICTURE).long()
        with handle.using(plan(handle, given, cache) if len(turn[0]) > 1 else None):
            logits.append(tiny.model(**given, **{CACHE: cache}, use_cache=True).logits)
        length = end
    return torch.cat(logits, 1)


SAID = [[3] * 9], [ONE], [[5, 6, 7]], [TWO], *([[token]] for token in TOKENS)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gemma3", "llama4", pytest.param("cohere2_vision", marks=pytest.mark.slow)])
def test_later_turns(kind: str, attention: str) -> None:
    """Text, a picture, text, a picture, an answer: as on a cache that keeps every row of sliding layers too."""
    tiny = build(kind, attention, layers=8)
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        kept, whole = DynamicCache(config=tiny.text.config), DynamicCache()
        logits, expected = talk(handle, tiny, kept, [*SAID]), talk(handle, tiny, whole, [*SAID])
    near(logits, expected)
    lengths = [stored_rows(layer) for layer in kept.layers]
    assert lengths[1] == lengths[3] == WINDOW - 1, "windows drop what they do not show"
    assert lengths[2] < whole.get_seq_length() == kept.get_seq_length(), "and full layers what was deferred"


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_later_turns_of_a_batch(kind: str, side: str) -> None:
    tiny, pad = build(kind, layers=8), [0] * (len(TWO) - len(ONE))
    first = [pad + ONE, TWO] if side == "left" else [ONE + pad, TWO]
    turns = [first, [[5, 6, 7]] * 2, [[9, *ONE], [*ONE, 8]], *([[token]] * 2 for token in TOKENS)]
    mask = torch.ones(2, sum(len(turn[0]) for turn in turns), dtype=torch.long)
    mask[0, : len(TWO)] = torch.tensor(first[0]) != 0
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        kept, whole = DynamicCache(config=tiny.text.config), DynamicCache()
        logits, expected = talk(handle, tiny, kept, turns, mask), talk(handle, tiny, whole, turns, mask)
    logits, expected = (found * mask[..., None] for found in (logits, expected))
    near(logits, expected)


@torch.no_grad()
def test_the_same_answer_in_every_way_of_generation() -> None:
    """Beams reorder the cache, prompt lookup takes tokens back; without a cache no row is ever dropped."""
    family = PICTURED["gemma3"]()
    plain = family.prompt(0, 3, 5)
    repeated = Prompt([*plain.ids, *plain.ids[-5:] * 2, *plain.ids[-5:-3]], plain.pictures)  # something to look up

    def generate(prompt: Prompt, **settings: Any) -> Any:
        given = {"do_sample": False, "max_new_tokens": 10, **settings}
        return family.tiny.model.generate(**family.inputs([prompt]), **given).tolist()

    schedule = reroute.Schedule((2, 4), (0.5, 0.3))
    with reroute.enable(family.tiny.model, schedule=schedule):
        assert generate(repeated, prompt_lookup_num_tokens=3) == generate(repeated)
        assert generate(plain, num_beams=3) == generate(plain, num_beams=3, use_cache=False)


@torch.no_grad()
def test_text_that_may_be_taken_back() -> None:
    """Not where some of it is padding: fillers would come behind rows, and push them out of their windows."""
    tiny, pad = build("gemma3", layers=8), [0] * (len(TWO) - len(ONE))
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        for ids, newest in (([TWO, TWO], 5), ([ONE + pad, TWO], 0)):
            given = torch.tensor(ids)
            mask, cache = (given != 0).long(), DynamicCache(config=tiny.text.config)
            with handle.using(handle.plan(given, mask)):
                tiny.model(input_ids=given, attention_mask=mask, **{CACHE: cache}, use_cache=True)
            layer: Any
            for layer in cache.layers:
                with pytest.raises(UnsupportedCacheError, match=f"only its {newest} tokens"):
                    layer.crop(-newest - 1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gemma3", "gemma4_unified"])
def test_what_the_plain_model_would_store(kind: str) -> None:
    """Of sliding layers no more than their window, in what savings are compared with; heads may differ."""
    tiny = build(kind, layers=8)
    plain = tiny.model(**batch(tiny, TWO), use_cache=True)
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in getattr(plain, CACHE).layers)
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        _, _, cache = decode(handle, tiny, TWO)
        stats = handle.stats()
    assert stats.kv_bytes_dense == dense > stats.kv_bytes
    assert stats.layer_lengths[3] == stored_rows(cache.layers[3]) == WINDOW - 1


# --- what may decide ------------------------------------------------------------------------------------------------


def by_norm(states: Tensor) -> Tensor:
    lengths: Tensor = states.float().norm(dim=-1)
    return lengths


@torch.no_grad()
@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("kind", ["gemma3", "llama4"])
def test_decisions_at_layers_with_windows(kind: str, action: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hidden states for any prompt; by attention for those that fit, with other rotary tables than full layers."""
    tiny, layers, ratios = build(kind, layers=8), (1, 2, 5), (0.9, 0.7, 0.4)
    rankers = (Norm(), LastTokenAttention(), LastTokenAttention())
    schedule = reroute.Schedule(layers, ratios, rankers)
    with reroute.enable(tiny.model, schedule=schedule, action=action, trace=True) as handle:
        with pytest.raises(RerouteError, match=r"longer than what the last token sees in layers \[5\].*\[.*2.*6.*\]"):
            handle.plan(**plan_inputs(batch(tiny, TWO)))
        window = "attention_chunk_size" if kind == "llama4" else "sliding_window"
        monkeypatch.setattr(tiny.text.config, window, len(TWO))
        for layer in tiny.layers:
            if getattr(layer.self_attn, "sliding_window", None) is not None:
                monkeypatch.setattr(layer.self_attn, "sliding_window", len(TWO))
        expected = predict(tiny, [*TWO, *TOKENS], layers, ratios, prompt=len(TWO), action=action, ranks={1: by_norm})
        assert expected.margin > 1e-6
        logits, after, _ = decode(handle, tiny, TWO)
        assert [stage.kept[0].tolist() for stage in handle.trace or ()] == expected.kept
        near(logits[0], expected.logits[: len(TWO)])
        near(after[:, 0], expected.logits[len(TWO) :])
        with pytest.raises(RerouteError, match="longer than what the last token sees"):
            handle.plan(**plan_inputs(batch(tiny, [*TWO, 3])))


def plan_inputs(given: dict[str, Tensor]) -> dict[str, Any]:
    return {name: given[name] for name in ("input_ids", "attention_mask")}


def test_methods_decide_where_they_may(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="reroute")
    gemma = build("gemma3", layers=8)
    with reroute.enable(gemma.model, keep=0.6) as handle:
        assert handle.schedule.layers == (0, 2, 6), "the first one asks no layer"
        assert "diverse decides before layers (0, 2, 6) of this model instead of (0, 2, 4)" in caplog.text
        handle.warm_up(visual=16)
        with handle.at(method="fastv", action="remove", keep=0.5):
            pass
        with handle.at(method="dart"):  # looks at two layers in a row
            handle.plan(torch.tensor([prompt(0, 1, 4, 1)]))
            with pytest.raises(RerouteError, match="longer than what the last token sees"):
                handle.plan(torch.tensor([ONE]))
    tiny = build("qwen3_vl")
    first = tiny.model.config.vision_config.deepstack_visual_indexes
    with reroute.enable(tiny.model) as handle:
        assert handle.schedule.layers[0] == len(first)


def test_renumbered_positions_and_turns_that_choose_again() -> None:
    tiny = build("gemma3", layers=8)
    several: list[dict[str, Any]] = [{"reopens": True, "keep": 0.6}, {"method": PDrop.official(), "action": "remove"}]
    for settings in several:
        with pytest.raises(RerouteError, match="is not built for layers that slide"):
            reroute.enable(tiny.model, **settings)


def test_flash_attention_counts_windows_in_rows() -> None:
    """At enable, and where it was chosen since."""
    tiny = build("cohere2_vision", layers=8)
    given = batch(tiny, ONE)
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        plan, cache = handle.plan(given["input_ids"]), DynamicCache(config=tiny.text.config)
        with handle.using(plan):
            tiny.model(**given, **{CACHE: cache}, use_cache=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny.text.config, "_attn_implementation", "flash_attention_2")
            calls: list[Callable[[], Any]] = [
                lambda: handle.plan(given["input_ids"]),
                lambda: tiny.model(**step(tiny, given, 7, cache)),
                lambda: reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))),
            ]
            for call in calls:
                with pytest.raises(RerouteError, match=r"counts the window of layers \[.*3.*\] in rows"):
                    call()


# --- keys that are shared -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_keys_for_an_assistant() -> None:
    tiny = build("gemma4_unified", layers=8)
    given = batch(tiny, ONE)
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, (0.4, 0.7))) as handle:
        with handle.using(handle.plan(given["input_ids"])):
            with pytest.raises(RerouteError, match="return_shared_kv_states asks for the keys of all tokens"):
                tiny.model(**given, return_shared_kv_states=True)
            cache = tiny.model(**given, use_cache=True)[CACHE]
        with pytest.raises(RerouteError, match="return_shared_kv_states asks for the keys of all tokens"):
            tiny.model(**step(tiny, given, 7, cache), return_shared_kv_states=True)


def test_layers_that_have_no_keys_of_their_own() -> None:
    config = configuration("gemma4_unified", 8)
    config.text_config.num_kv_shared_layers = 2
    with torch.device("meta"):
        model: Any = getattr(transformers, TYPES["gemma4_unified"])(config)
    with pytest.raises(UnsupportedModelError, match=r"also takes logits_to_keep|has no 'self_attn.k_proj'"):
        reroute.enable(model, schedule=reroute.Schedule((2,), (0.4,)))
