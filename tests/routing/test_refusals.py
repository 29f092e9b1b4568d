"""What cannot be right is refused with a sentence that says what to do, and nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import models
import pytest
import torch
from models import CACHE, Tiny
from support import RULES, cache_of, close, enable, generate, refuses, snapshot, state_of, unchanged
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, StaticCache

import reroute
from reroute.core.prefill import PositionTables
from reroute.errors import RerouteError, UnsupportedCacheError, UnsupportedModelError
from reroute.methods import METHODS, FastV, PDrop
from reroute.rankers import LastTokenAttention, RankInputs, ScoreRanker
from reroute_kernels import Backend, BackendUnavailable, PagedPool, PoolLimitError, resolve

KNOWN = ", ".join(sorted(METHODS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fastvv"}, f"Unknown method 'fastvv'; known: {KNOWN}. Did you mean 'fastv'"),
        ({"method": 3}, KNOWN),
        ({"action": "prune"}, "Unknown action 'prune'; known: remove, route"),
        ({"backend": "cuda"}, "Unknown backend 'cuda'; known: auto, torch, triton"),
        ({"method": "pdrop", "keep": 0.01}, "out of reach"),
        ({"keep": 0}, "above 0"),
        ({"keep": 1.5}, "at most 1"),
        ({"keep": 0.5, "schedule": reroute.Schedule((2,), (0.5,))}, "not both"),
        ({"schedule": reroute.Schedule((2, 8), (0.5, 0.5))}, "Routing layer 8 does not exist: the model has 8 layers"),
        ({"schedule": reroute.Schedule((2, 4), (0.2, 0.5)), "action": "remove"}, "a removed token cannot return"),
        ({"schedule": reroute.Schedule((2,), (0.5,), position_mode="renumbered")}, "need action 'remove'"),
        ({"method": FastV(layer=9, ratio=0.5)}, "does not exist"),
        ({"method": PDrop((2, 4), (0.5,))}, "one ratio per routing layer"),
    ],
)
def test_settings(tiny: Tiny, settings: dict[str, Any], message: str) -> None:
    before = snapshot(tiny.model)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        reroute.enable(tiny.model, **settings)
    assert snapshot(tiny.model) == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (2, 2), "ratios": (0.5, 0.5)}, "strictly increasing"),
        ({"layers": (4, 2), "ratios": (0.5, 0.5)}, "strictly increasing"),
        ({"layers": (-1,), "ratios": (0.5,)}, "0 or more"),
        ({"layers": (2,), "ratios": (-0.1,)}, "from 0 to 1"),
        ({"layers": (2,), "ratios": (1.01,)}, "from 0 to 1"),
        ({"layers": (2,), "ratios": (0.5,), "rounding": "up"}, "known: floor, floor0, half_even"),
        ({"layers": (2,), "ratios": (0.5,), "position_mode": "gone"}, "known: preserved, renumbered"),
        ({"layers": (0,), "ratios": (0.5,), "rankers": LastTokenAttention(-1)}, "from layer 0 on"),
    ],
)
def test_schedules(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RerouteError, match=message):
        reroute.Schedule(**fields)


def test_backend_says_why(tiny: Tiny) -> None:
    with pytest.raises(BackendUnavailable, match="cpu"):
        reroute.enable(tiny.model, backend="triton")


def test_backend_by_environment(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REROUTE_BACKEND", "torch")
    with reroute.enable(tiny.model, backend="triton") as handle:
        assert handle.stats().backend == "torch"
    monkeypatch.setenv("REROUTE_BACKEND", "gpu")
    for model in (tiny.model, None):
        with pytest.raises(RerouteError, match=r"'gpu' \(from REROUTE_BACKEND\).*Unset REROUTE_BACKEND"):
            reroute.enable(model)


def test_backend_follows_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is chosen by the decoder's device, and again once that is of another type."""
    chosen: list[str] = []
    plain = resolve("torch", torch.device("cpu"))

    def choose(name: str, device: torch.device) -> Backend:
        chosen.append(device.type)
        if len(chosen) == 2:
            raise BackendUnavailable(name, "of the test")
        return plain

    monkeypatch.setattr("reroute.config.resolve", choose)
    tiny = models.llava(layers=4)
    ids = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])["input_ids"]
    hidden = torch.zeros(*ids.shape, tiny.model.config.text_config.hidden_size)
    tiny.model.to("meta")
    with reroute.enable(tiny.model, keep=0.5) as handle:
        plan = handle.plan(ids)
        assert plan is not None
        tables = PositionTables(hidden, hidden, None)

        def start() -> None:
            handle._home_of(plan, hidden, tables, None).close()

        with pytest.raises(BackendUnavailable, match="of the test"):
            start()
        for _ in range(2):  # a choice that failed was not made
            start()
    assert chosen == ["meta", "cpu", "cpu"]


def test_models() -> None:
    text_only = LlamaForCausalLM(
        LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    for model in (text_only, models.tiny("llava-gqa").model.model.language_model, torch.nn.Linear(1, 1)):
        with pytest.raises(UnsupportedModelError, match=r"no visual tokens.*reroute doctor lists the \d\d types"):
            reroute.enable(model)
    with pytest.raises(UnsupportedModelError, match="ForConditionalGeneration"):
        reroute.enable(models.tiny("llava-gqa").model.model)
    with pytest.raises(UnsupportedModelError, match=r"DataParallel is a wrapper around the model. Pass its .module"):
        reroute.enable(torch.nn.DataParallel(models.tiny("llava-gqa").model))


def test_what_fsdp1_wraps() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = models.llava(layers=3).model
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # without processes
    torch.nn.Module.__init__(wrapper)
    wrapper._fsdp_wrapped_module = model.model.language_model.layers[1]
    model.model.language_model.layers[1] = wrapper
    with pytest.raises(UnsupportedModelError, match=r"is wrapped by FSDP1 .*fully_shard"):
        reroute.enable(model)


class Forwarding(torch.nn.Module):
    """What PEFT wraps a model in, twice: all that it lacks it takes from inside."""

    def __init__(self, **inside: torch.nn.Module) -> None:
        super().__init__()
        for name, module in inside.items():
            setattr(self, name, module)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(next(iter(modules.values())), name)

    def get_base_model(self) -> Any:
        return self.base_model.model


def test_adapters(tiny: Tiny) -> None:
    wrapper = Forwarding(base_model=Forwarding(model=tiny.model))
    with pytest.raises(UnsupportedModelError, match=r"Forwarding is a wrapper.*model\.get_base_model\(\)"):
        reroute.enable(wrapper)
    reroute.enable(wrapper.get_base_model()).disable()


def test_models_of_which_other_processes_have_parts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor parallelism that works has processes (``test_parallel``)."""
    with monkeypatch.context() as patch:
        patch.setattr(tiny.model, "_tp_size", 2)
        with pytest.raises(UnsupportedModelError, match="none of its weights says which processes share them"):
            reroute.enable(tiny.model)
    monkeypatch.setattr(tiny.model.config, "distributed_config", SimpleNamespace(pp_size=2), raising=False)
    with pytest.raises(UnsupportedModelError, match="pipeline parallelism: each process has a part of the layers"):
        reroute.enable(tiny.model)


def test_a_type_that_cannot_be_right(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.llava(layers=2).model
    monkeypatch.setattr(type(model.config), "model_type", "mllama")
    with pytest.raises(UnsupportedModelError, match=r"Cannot route Llava.*'mllama'.*cross-attention"):
        reroute.enable(model)


def test_sliding_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """That only the configuration knows of: attention was made without them."""
    tiny = models.qwen(layers=4)
    text = tiny.model.config.get_text_config()
    monkeypatch.setattr(tiny.model.model.language_model, "has_sliding_layers", True)
    text.layer_types = ["full_attention", "full_attention", "full_attention", "sliding_attention"]
    text.sliding_window = 8
    with pytest.raises(RerouteError, match=r"Layers \[3\] use sliding-window"):
        reroute.enable(tiny.model, method="fastv", keep=0.6)
    text.layer_types = ["sliding_attention", *["full_attention"] * 3]
    reroute.enable(tiny.model, schedule=reroute.Schedule((1,), (0.5,))).disable()


def test_renumbered_m_rope() -> None:
    with pytest.raises(RerouteError, match="M-RoPE"):
        reroute.enable(models.tiny("qwen").model, method=PDrop.official(), action="remove")


# --- while running ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["argument", "config", "model"])
def test_chunked_prefill(tiny: Tiny, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    given: dict[str, Any] = {"prefill_chunk_size": 8} if where == "argument" else {}
    if where == "config":
        given["generation_config"] = GenerationConfig(prefill_chunk_size=8)  # type: ignore[no-untyped-call]
    if where == "model":
        monkeypatch.setattr(tiny.model.generation_config, "prefill_chunk_size", 8, raising=False)
    refuses(tiny, RerouteError, "[Cc]hunked prefill", lambda: generate(tiny, [sample], **given))


def test_chunks_are_turned_off_by_what_the_refusal_says(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Transformers too a keyword goes before every configuration, and None in an own one leaves the model's."""
    monkeypatch.setattr(tiny.model.generation_config, "prefill_chunk_size", 8, raising=False)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    config = GenerationConfig(max_new_tokens=2, prefill_chunk_size=None)  # type: ignore[no-untyped-call]
    with enable(tiny, RULES[0]) as handle:
        with pytest.raises(RerouteError, match="generate with prefill_chunk_size=None"):
            tiny.model.generate(given.pop("input_ids"), config, **given)
        generate(tiny, [tiny.prompt(0, 5, tiny.grid, 4)], prefill_chunk_size=None)
        assert handle.stats().prefills == 1


UNKNOWN_MASKS = ("an_own_function", "paged|eager")


@pytest.mark.parametrize("name", UNKNOWN_MASKS)
def test_attention_with_unknown_masks(tiny: Tiny, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny.model.config.get_text_config(), "_attn_implementation", name)
    before = snapshot(tiny.model)
    with pytest.raises(
        RerouteError, match=rf"'{re.escape(name)}' cannot be routed.* 'sdpa', 'eager', 'flex_attention' or a flash"
    ):
        enable(tiny, RULES[0])
    assert snapshot(tiny.model) == before


@pytest.mark.parametrize("name", UNKNOWN_MASKS)
def test_attention_that_is_set_later(tiny: Tiny, name: str) -> None:
    """Before a routed prefill, and before tokens that follow one."""
    sample, follower = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2)
    with enable(tiny, RULES[0]):
        cache = getattr(tiny.model(**tiny.inputs([sample]), use_cache=True), CACHE)
    for given in (tiny.inputs([sample]), {**tiny.follow([sample], [follower]), CACHE: cache}):

        def call(given: dict[str, Any] = given) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(tiny.model.config.get_text_config(), "_attn_implementation", name)
                tiny.model(**given)

        refuses(tiny, RerouteError, "cannot be routed: its masks are not known", call)
    assert cache.get_seq_length() == len(sample)


@dataclass(frozen=True)
class Own(ScoreRanker):
    """A ranker that scores as it likes."""

    rank: Callable[[list[Tensor]], Any] = list

    def scores(self, inputs: RankInputs) -> Any:
        return self.rank(inputs.hidden)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (lambda hidden: [x.norm() for x in hidden], r"scored sample 0 with \(\) instead of \(16,\)"),
        (lambda hidden: [x.norm(dim=-1, keepdim=True) for x in hidden], r"scored sample 0 with \(16, 1\) instead"),
        (
            lambda hidden: [hidden[0].norm(dim=-1), hidden[0].norm(dim=-1)],
            r"scored sample 1 with \(16,\) instead of \(0,\)",
        ),
        (lambda hidden: [x.norm(dim=-1).tolist() for x in hidden], "scored sample 0 with list instead"),
        (lambda hidden: [x.norm(dim=-1) for x in hidden[:1]], "scored 1 samples instead of 2"),
        (lambda hidden: None, "scored 0 samples instead of 2"),
    ],
)
def test_scores_of_another_shape(tiny: Tiny, rank: Callable[[list[Tensor]], Any], message: str) -> None:
    """They would be broadcast, and nobody would notice."""
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 9)])
    with (
        enable(tiny, RULES[0], ranker=Own(rank)),
        pytest.raises(RerouteError, match=f"Own {message}"),
    ):
        tiny.model(**given)


def test_a_prompt_without_a_question(tiny: Tiny) -> None:
    chunk = tiny.inputs([tiny.prompt(0, 5, tiny.grid)])
    refuses(tiny, RerouteError, "question after the picture", lambda: tiny.model(**chunk))


def test_sliding_cache(tiny: Tiny) -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer

    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    cache = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(tiny.num_layers)]
    refuses(tiny, UnsupportedCacheError, "DynamicSlidingWindowLayer", lambda: tiny.model(**given, **{CACHE: cache}))


def test_text_goes_with_any_cache(tiny: Tiny) -> None:
    """Nothing is routed, so nothing is asked of the cache."""
    given = tiny.inputs([tiny.prompt(0, 9)])
    expected = tiny.model(**given).logits
    with enable(tiny, RULES[0]):
        cache = StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=64)
        close(tiny.model(**given, **{CACHE: cache}).logits, expected)


def test_prepared_masks(tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)], positions=True)
    length = given["input_ids"].shape[1]
    given["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    refuses(tiny, RerouteError, "2-D attention_mask", lambda: tiny.model(**given))


def test_a_row_of_padding_only(tiny: Tiny) -> None:
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 6)])
    given["attention_mask"][1] = 0
    refuses(tiny, RerouteError, "Sample 1 has no prompt token", lambda: tiny.model(**given))


def test_pool_limit(tiny: Tiny) -> None:
    """25 rows of 64 floats need two pages of 16 rows; the limit is one page."""
    pool = PagedPool(64, torch.float32, "cpu", page_size=16, max_bytes=4096)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    refuses(tiny, PoolLimitError, "8192 bytes.*limit is 4096", lambda: tiny.model(**given), pool=pool)
    assert pool.stats().leases == 0


def test_pool_of_another_kind(tiny: Tiny) -> None:
    with pytest.raises(RerouteError, match="rows of 32 features, the model's have 64"):
        enable(tiny, RULES[0], pool=PagedPool(32, torch.float32, "cpu"))
    half = PagedPool(64, torch.float16, "cpu")
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    refuses(tiny, RerouteError, "float16 on cpu, the model runs torch.float32", lambda: tiny.model(**given), pool=half)


def test_renumbered_later_turn() -> None:
    """Whether the earlier turn is renumbered, or the later one, or both."""
    tiny = models.tiny("llava-gqa")
    first, second = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)
    renumbered = {"schedule": reroute.Schedule((2,), (0.5,), position_mode="renumbered"), "action": "remove"}
    for one, two in ((renumbered, renumbered), ({}, renumbered), (renumbered, {}), (renumbered, {"keep": 0.9})):
        with reroute.enable(tiny.model) as handle:
            with handle.at(**one):
                cache = cache_of(tiny.model(**tiny.inputs([first]), use_cache=True))
            before, follow = state_of(cache), tiny.follow([first], [second])
            with handle.at(**two), pytest.raises(RerouteError, match="one prompt only"):
                tiny.model(**follow, **{CACHE: cache})
            unchanged(cache, before)


def test_trace_is_off() -> None:
    with reroute.enable(models.tiny("qwen").model) as handle, pytest.raises(RerouteError, match="trace=True"):
        handle.trace  # noqa: B018


def test_process_wide_settings_are_checked_at_once() -> None:
    with pytest.raises(RerouteError, match="Unknown method"):
        reroute.enable(method="fastvv")
    with pytest.raises(BackendUnavailable):
        reroute.enable(backend="triton")
    with pytest.raises(RerouteError, match=r"at most 1, .*not 7"):
        reroute.enable(keep=7.0)
    with pytest.raises(RerouteError, match="pass the model"):
        reroute.enable(pool=PagedPool(64, torch.float32, "cpu"))  # type: ignore[call-overload]
