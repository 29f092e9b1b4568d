"""Types of which some layers keep a state, against the dense oracle: batches, long answers, and later turns."""

from __future__ import annotations

import copy
import functools
from typing import Any

import dense
import pytest
import torch
import transformers
from dense import OF_STATES, predict
from models import CACHE, TRANSFORMERS
from pictured import PICTURED, Prompt
from test_types import ONE, TWO, batch, prompt, step
from test_windows import TOKENS, WAYS, by_norm, check_against_oracle, decode, talk
from tiny_types import RECURRENT, TYPES, build, configuration
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.models.qwen3_5 import modeling_qwen3_5

import reroute
from reroute.errors import RerouteError, UnsupportedCacheError, UnsupportedModelError
from reroute.methods import PDrop
from reroute.rankers import LastTokenAttention, Norm

LAYERS = (2, 6)
near = functools.partial(dense.near, share=OF_STATES)
ALIKE = ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")
"""Types whose decoder is Qwen3.5's."""
SAMPLES = ("qwen3_5", "lfm2_vl")
CASES = [
    pytest.param(kind, *way, marks=[pytest.mark.slow] * (kind in ALIKE or (kind not in SAMPLES and way != WAYS[0])))
    for kind in RECURRENT
    if kind in TYPES
    for way in WAYS
]


@pytest.mark.parametrize(("kind", "action", "attention"), CASES)
def test_a_recurrent_type_against_the_oracle(kind: str, action: Any, attention: str) -> None:
    check_against_oracle(kind, action, attention, OF_STATES)


# --- caches ---------------------------------------------------------------------------------------------------------


SCHEDULE = reroute.Schedule(LAYERS, (0.4, 0.7))
STATES = pytest.mark.parametrize("kind", ["qwen3_5", "lfm2_vl"])


@torch.no_grad()
@STATES
def test_text_before_and_after_a_picture(kind: str) -> None:
    """Each in a turn of its own, or all in one and the answer step by step."""
    tiny, before, after = build(kind, layers=8), [3] * 5, [5, 6, 7, 8, 9]
    turns = [[[before], [ONE], [after]], [[[*before, *ONE]], *([[token]] for token in after)]]
    with reroute.enable(tiny.model, schedule=SCHEDULE, trace=True) as handle:
        for said in turns:
            logits = talk(handle, tiny, DynamicCache(config=tiny.text.config), said)[0]
            chosen = [stage.kept[0].tolist() for stage in handle.trace]
            ids = [*before, *ONE, *after]
            near(logits, predict(tiny, ids, LAYERS, (), prompt=len(before) + len(ONE), chosen=chosen).logits)


@torch.no_grad()
@STATES
def test_later_turns_of_a_batch(kind: str) -> None:
    """Fillers between the rows of two turns would change states."""
    tiny, other, longer = build(kind, layers=8), [*ONE[:-1], 9], prompt(2, 3, 9, 3)
    cache, alone = (DynamicCache(config=tiny.text.config) for _ in range(2))
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        both = talk(handle, tiny, cache, [[ONE, other], [other, ONE]])
        near(both[1:], talk(handle, tiny, alone, [[other], [ONE]]))
        mask = torch.ones(2, 2 * len(ONE) + len(longer), dtype=torch.long)
        with pytest.raises(RerouteError, match=r"keep a state, and samples of this later turn keep different"):
            handle.plan(torch.tensor([ONE, longer]), mask, cache)


@torch.no_grad()
@STATES
def test_forwards_without_routing(kind: str) -> None:
    """They are refused before any state has changed: the cache goes on when routing does."""
    tiny = build(kind, layers=8)
    expected = predict(tiny, [*ONE, *TOKENS[:2]], LAYERS, (0.4, 0.7), prompt=len(ONE)).logits
    cache = DynamicCache(config=tiny.text.config)
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        talk(handle, tiny, cache, [[ONE], [[TOKENS[0]]]])
    last = step(tiny, batch(tiny, [*ONE, TOKENS[0]]), TOKENS[1], cache)
    with pytest.raises(UnsupportedCacheError, match="this forward runs without it"):
        tiny.model(**last, use_cache=True)
    copied = copy.deepcopy(cache)
    for again in (cache, copied):
        with reroute.enable(tiny.model, schedule=SCHEDULE):
            near(tiny.model(**{**last, CACHE: again}, use_cache=True).logits[0, -1], expected[-1])


@torch.no_grad()
@STATES
@pytest.mark.parametrize("layer", [0, 3])
def test_forwards_that_fail(kind: str, layer: int) -> None:
    """Of a state it cannot be seen whether it has changed."""
    tiny, given = build(kind, layers=8), batch(build(kind, layers=8), ONE)

    def fail(*_: Any) -> None:
        raise InterruptedError

    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        for has_begun in (False, True):
            cache = DynamicCache(config=tiny.text.config)
            if has_begun:
                talk(handle, tiny, cache, [[ONE]])
            hook = tiny.layers[layer].register_forward_hook(fail)
            with pytest.raises(InterruptedError), handle.using(None if has_begun else handle.plan(given["input_ids"])):
                tiny.model(**(step(tiny, given, 7, cache) if has_begun else {**given, CACHE: cache}), use_cache=True)
            hook.remove()
            with pytest.raises(UnsupportedCacheError, match="left half filled"):
                tiny.model(**step(tiny, given, 7, cache), use_cache=True)


@torch.no_grad()
def test_caches_of_other_layers() -> None:
    tiny, given = build("qwen3_5", layers=8), batch(build("qwen3_5", layers=8), ONE)
    cache = DynamicCache(config=tiny.text.config)
    cache.layers[3], cache.layers[4] = cache.layers[4], cache.layers[3]
    sentence = "DynamicLayer, LinearAttentionLayer cannot"
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle, pytest.raises(UnsupportedCacheError, match=sentence):
        handle.plan(given["input_ids"], cache=cache)


@torch.no_grad()
def test_what_is_stored() -> None:
    """States are no keys: they are counted neither as stored nor as saved."""
    tiny = build("qwen3_5", layers=8)
    plain = getattr(tiny.model(**batch(tiny, TWO), use_cache=True), CACHE)
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers if hasattr(layer, "keys"))
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        decode(handle, tiny, TWO)
        stats = handle.stats()
    assert stats.kv_bytes_dense == dense > stats.kv_bytes
    assert [length == 0 for length in stats.layer_lengths] == [not hasattr(layer, "keys") for layer in plain.layers]


# --- what may decide ------------------------------------------------------------------------------------------------


def test_decisions_at_recurrent_layers() -> None:
    tiny = build("qwen3_5", layers=8)
    with pytest.raises(
        RerouteError, match=r"before layers \[3\]: .* keeps a state.*some of the layers \[1, 2, 4, 5, 6\]"
    ):
        reroute.enable(tiny.model, schedule=reroute.Schedule((2, 3), (0.5, 0.4)))
    with reroute.enable(tiny.model, method="pdrop", keep=0.6) as handle:
        assert handle.schedule.layers == (1, 4, 5)
    several: list[dict[str, Any]] = [{"reopens": True, "keep": 0.6}, {"method": PDrop.official(), "action": "remove"}]
    for settings in several:
        with pytest.raises(RerouteError, match=r"not built for layers that slide, keep a state|one position id per"):
            reroute.enable(tiny.model, **settings)


@torch.no_grad()
@pytest.mark.parametrize("action", ["route", "remove"])
@pytest.mark.parametrize("kind", [kind for kind in ("qwen3_5", "lfm3_vl", "nemotron_h_omni") if kind in TYPES])
def test_decisions_that_ask_no_layer(kind: str, action: Any) -> None:
    """Before one with a state, without rotary tables, or with an MLP alone; then attention ranks, by its own tables."""
    tiny, ratios = build(kind, layers=8), (0.7, 0.4)
    layers = {"qwen3_5": (3, 4), "lfm3_vl": (3, 6), "nemotron_h_omni": (1, 6)}[kind]
    schedule = reroute.Schedule(layers, ratios, (Norm(), LastTokenAttention()))
    expected = [
        predict(tiny, [*ids, *TOKENS], layers, ratios, prompt=len(ids), action=action, ranks={layers[0]: by_norm})
        for ids in (ONE, TWO)
    ]
    with reroute.enable(tiny.model, schedule=schedule, action=action, trace=True) as handle:
        logits, after, _ = decode(handle, tiny, ONE, TWO)
    for b, (ids, one) in enumerate(zip((ONE, TWO), expected, strict=True)):
        assert one.margin > 1e-6
        assert [stage.kept[b].tolist() for stage in handle.trace or ()] == one.kept
        near(logits[b, -len(ids) :], one.logits[: len(ids)])
        near(after[:, b], one.logits[len(ids) :])


# --- a layer that does something else -------------------------------------------------------------------------------


def by_place(plain: Any, self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return plain(self, hidden, *args, **kwargs) * (1 + torch.arange(hidden.shape[1]))[:, None]


def both_ways(plain: Any, self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return plain(self, hidden, *args, **kwargs) + hidden.mean(1, keepdim=True)


def unmasked(plain: Any, self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    return plain(self, hidden, *args, **{**kwargs, "attention_mask": None})


def attending(plain: Any, self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    heads = hidden[:, None]
    interface: Any = AttentionInterface()  # type: ignore[no-untyped-call]
    return interface["reroute_dry_run"](self, heads, heads, heads, None)


FAULTS = {
    by_place: "rows that its mask hides leave something behind",
    both_ways: "depend on what comes after them",
    unmasked: "rows that its mask hides leave something behind",
    attending: "calls an attention function",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_does_something_else(fault: Any) -> None:
    tiny = copy.deepcopy(build("lfm2_vl", layers=8))
    kind = type(tiny.layers[3].conv)
    plain = kind.forward

    class Odd(kind):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return fault(plain, self, hidden_states, *args, **kwargs)

    tiny.layers[3].conv.__class__ = Odd
    with pytest.raises(UnsupportedModelError, match=f"Decoder layer 3 .*{FAULTS[fault]}"):
        reroute.enable(tiny.model, schedule=SCHEDULE)


def test_a_bias_in_a_convolution() -> None:
    """Rows that are padding then are not zero for those behind them, in the plain model too."""
    config = configuration("lfm2_vl", 8)
    config.text_config.conv_bias = True
    with torch.device("meta"):
        model: Any = getattr(transformers, TYPES["lfm2_vl"])(config)
    with pytest.raises(UnsupportedModelError, match="rows that its mask hides leave something behind"):
        reroute.enable(model, schedule=SCHEDULE)


def test_kernels_that_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where packages have kernels for these layers, Transformers calls them, and dry runs are on the CPU."""

    def kernel(plain: Any) -> Any:
        @functools.wraps(plain)
        def call(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a GPU is needed")

        return call

    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):
        monkeypatch.setattr(modeling_qwen3_5, name, kernel(getattr(modeling_qwen3_5, name)))
    tiny = copy.deepcopy(build("qwen3_5", layers=8))
    reroute.enable(tiny.model, schedule=SCHEDULE).disable()


# --- generation -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@STATES
def test_the_same_answer_in_every_way_of_generation(kind: str) -> None:
    """Beams reorder states. Prompt lookup takes rows back: those for a convolution go back, a recurrent state not."""
    family = PICTURED[kind]()
    plain = family.prompt(0, 3, 5)
    repeated = Prompt([*plain.ids, *plain.ids[-5:] * 2, *plain.ids[-5:-3]], plain.pictures)  # something to look up

    def generate(prompt: Prompt, **settings: Any) -> Any:
        given = {"do_sample": False, "max_new_tokens": 10, **settings}
        return family.tiny.model.generate(**family.inputs([prompt]), **given).tolist()

    with reroute.enable(family.tiny.model, schedule=reroute.Schedule((2, 4), (0.5, 0.3))):
        if kind == "lfm2_vl" or TRANSFORMERS >= (5, 19):  # before, beams mix up pictures of many patches
            assert generate(plain, num_beams=3) == generate(plain, num_beams=3, use_cache=False)
        if kind == "lfm2_vl":
            assert generate(repeated, prompt_lookup_num_tokens=3) == generate(repeated)


@torch.no_grad()
@STATES
def test_a_last_layer_with_a_state(kind: str) -> None:
    """It alone runs fewer rows: no layer lacks keys, and steps after the prompt are routed ones all the same."""
    tiny, layers, ratios = build(kind, layers=8), (7,), (0.4,)
    expected = predict(tiny, [*ONE, *TOKENS], layers, ratios, prompt=len(ONE), ranks={7: by_norm})
    with reroute.enable(tiny.model, schedule=reroute.Schedule(layers, ratios, (Norm(),))) as handle:
        logits, after, cache = decode(handle, tiny, ONE)
    near(logits[0], expected.logits[: len(ONE)])
    near(after[:, 0], expected.logits[len(ONE) :])
    with pytest.raises(UnsupportedCacheError, match="this forward runs without it"):
        tiny.model(input_ids=torch.tensor([[5]]), use_cache=True, **{CACHE: cache})
