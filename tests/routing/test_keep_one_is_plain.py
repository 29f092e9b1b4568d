"""With ``keep=1`` a model is the plain one in all that it can do, routing's own limits included, bit for bit."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from attentions import FLASH, attention_of
from changes import prompt
from models import CACHE, Tiny
from oracle import Rules
from support import FEW, cache_of, enable, generate, schedule, small
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import reroute
from reroute.errors import RerouteError

Made = list[Tensor]
Case = Callable[[Tiny], Made]


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def ids(tiny: Tiny) -> Tensor:
    """Position ids of two prompts in one row."""
    parts = [tiny.positions(prompt(tiny)), tiny.positions(tiny.prompt(1, 2, tiny.grid, 3))]
    row = torch.cat(parts, -1)
    return torch.cat([torch.arange(row.shape[-1])[None] % 25, row])[:, None] if tiny.is_qwen else row[None]


def packed(tiny: Tiny) -> dict[str, Any]:
    given = tiny.inputs([prompt(tiny) + tiny.prompt(1, 2, tiny.grid, 3)])
    del given["attention_mask"]
    return {**given, "position_ids": ids(tiny), "use_cache": False}


def stored(cache: Any) -> Made:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def generated(tiny: Tiny, samples: Any = None, **settings: Any) -> Made:
    output = generate(tiny, [prompt(tiny)] if samples is None else samples, 4, **settings)
    return [output.sequences, *output.logits, *stored(cache_of(output))]


def static_cache(tiny: Tiny) -> Made:
    cache = StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=48)
    output = tiny.model(**tiny.inputs([prompt(tiny)], positions=True), **{CACHE: cache})
    return [output.logits, *stored(cache)]


def sliding_cache(tiny: Tiny) -> Made:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=8) for _ in range(tiny.num_layers)]
    output = tiny.model(**tiny.inputs([prompt(tiny)], positions=True), **{CACHE: cache})
    return [output.logits, *stored(cache)]


def masks(tiny: Tiny) -> dict[str, Any]:
    given: dict[str, Any] = tiny.inputs([prompt(tiny)], positions=True)
    length = given["input_ids"].shape[1]
    given["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    return given


def flash_packed(tiny: Tiny) -> Made:
    """Borders as arguments, which flash attention reads."""
    given = packed(tiny)
    length = given["input_ids"].shape[1]
    borders = torch.tensor([0, len(prompt(tiny)), length], dtype=torch.int32)
    given |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders, "max_length_q": 25, "max_length_k": 25}
    with attention_of(tiny, FLASH):
        return [tiny.model(**given).logits]


def ends_in_a_picture(tiny: Tiny) -> Made:
    samples = [tiny.prompt(0, 5, tiny.grid)]
    return [tiny.model(**tiny.inputs(samples)).logits, *generated(tiny, samples)]


def padding_only(tiny: Tiny) -> Made:
    given = tiny.inputs([prompt(tiny), tiny.prompt(1, 6)], positions=True)
    given["attention_mask"][1] = 0
    return [tiny.model(**given).logits]


def biased(tiny: Tiny) -> Made:
    return [tiny.model(**tiny.inputs([prompt(tiny)]), my_bias=torch.zeros(1, len(prompt(tiny)))).logits]


def own_attention(tiny: Tiny) -> Made:
    """A function of one's own, registered in Transformers: what masks it takes is not known."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    with pytest.MonkeyPatch.context() as patch:
        for functions in (MASKS, FUNCTIONS):
            patch.setitem(functions._global_mapping, "own", functions["sdpa"])
        patch.setattr(tiny.model.config.get_text_config(), "_attn_implementation", "own")
        return generated(tiny)


CASES: dict[str, tuple[Case, str]] = {
    "sliding cache": (sliding_cache, "DynamicSlidingWindowLayer cannot"),
    "chunked prefill": (functools.partial(generated, prefill_chunk_size=22), "Chunked prefill"),
    "4-D mask": (lambda tiny: [tiny.model(**masks(tiny)).logits], "2-D attention_mask"),
    "packed rows": (lambda tiny: [tiny.model(**packed(tiny)).logits], "Several prompts are packed"),
    "packed rows of flash attention": (flash_packed, "Several prompts are packed"),
    "a prompt that ends in its picture": (ends_in_a_picture, "no text to rank them by"),
    "a row of padding": (padding_only, "Sample 1 has no prompt token"),
    "an argument for each token": (biased, "my_bias has an entry for each token"),
    "attention of one's own": (own_attention, "'own' cannot be routed"),
}
"""What routing refuses, and how."""

ROUTED_TOO: dict[str, Case] = {
    "static cache": static_cache,
    "generation with a static cache": functools.partial(generated, cache_implementation="static", disable_compile=True),
}
"""What routing can do, and does with ``keep=1`` as the plain model."""

SETTINGS: dict[str, dict[str, Any]] = {
    "keep": {"keep": 1.0},
    "fastv": {"method": "fastv", "keep": 1},
    "a schedule": {"schedule": reroute.Schedule((0, 3), (1.0, 1.0))},
    "remove": {"schedule": reroute.Schedule((1, 3), (1.0, 1.0)), "action": "remove"},
}


def same(made: Made, expected: Made) -> bool:
    return len(made) == len(expected) and all(map(torch.equal, made, expected))


@pytest.mark.parametrize("case", CASES)
def test_what_routing_refuses(few: Tiny, case: str) -> None:
    """Plain with ``keep=1``, for the model or for the call; and a refusal otherwise, so the case is one."""
    if case == "chunked prefill" and few.model.config.model_type == "qwen2_5_vl" and models.TRANSFORMERS < (5, 24):
        pytest.skip("this release of Transformers splits a prompt of Qwen2.5-VL without its pictures' rows, and fails")
    run, message = CASES[case]
    plain = run(few)
    for settings in SETTINGS.values():
        with reroute.enable(few.model, **settings):
            assert same(run(few), plain), settings
    with enable(few, FEW) as handle:
        with pytest.raises(RerouteError, match=message):
            run(few)
        with handle.at(keep=1.0):
            assert same(run(few), plain)
        with pytest.raises(RerouteError, match=message):
            run(few)
    with reroute.enable(few.model, keep=1.0) as handle, handle.at(schedule=schedule(FEW)):
        with pytest.raises(RerouteError, match=message):
            run(few)
        with handle.at(keep=1):
            assert same(run(few), plain)
    assert same(run(few), plain)


@pytest.mark.parametrize("case", ROUTED_TOO)
def test_what_is_routed_too(few: Tiny, case: str) -> None:
    run = ROUTED_TOO[case]
    plain = run(few)
    for settings in SETTINGS.values():
        with reroute.enable(few.model, **settings):
            assert same(run(few), plain), settings
    with enable(few, FEW) as handle:
        assert not same(run(few), plain)
        with handle.at(keep=1.0):
            assert same(run(few), plain)
    assert same(run(few), plain)


def test_attention_that_cannot_be_routed(few: Tiny) -> None:
    """It is asked for when something shall be routed."""
    text = few.model.config.get_text_config()
    plain = few.model(**few.inputs([prompt(few)])).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "layer_types", ["full_attention"] * 4 + ["sliding_attention"], raising=False)
        with pytest.raises(RerouteError, match="use sliding-window attention"):
            enable(few, FEW)
        with reroute.enable(few.model, keep=1.0) as handle:
            with pytest.raises(RerouteError, match="use sliding-window attention"):
                handle.at(keep=0.5)
            patch.undo()
            assert torch.equal(few.model(**few.inputs([prompt(few)])).logits, plain)


def test_prefills_are_counted(few: Tiny) -> None:
    """With a cache whose layers do not tell how long they are, too."""
    with reroute.enable(few.model, keep=1.0) as handle:
        refused = (CASES[case][0] for case in ("sliding cache", "4-D mask", "packed rows"))
        for count, run in enumerate((static_cache, *refused), 1):
            run(few)
            assert handle.totals().prefills == count
            assert handle.stats().keep == 1


# --- compiled code ------------------------------------------------------------------------------------------------


@pytest.fixture
def forgetting() -> Iterator[None]:
    """No compiled code goes from one test to the next."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def two() -> Tiny:
    """Few layers to compile."""
    return models.llava(layers=2)


HALF = reroute.Schedule((1,), (0.5,))


def whole_graph(tiny: Tiny) -> Any:
    return torch.compile(tiny.model, backend="eager", fullgraph=True)


@pytest.mark.usefixtures("forgetting")
@pytest.mark.filterwarnings("ignore")
def test_one_graph(two: Tiny) -> None:
    """``fullgraph=True`` allows no break; and the graph is not used for calls that are routed."""
    given = {**two.inputs([prompt(two)]), "use_cache": False}
    plain = two.model(**given).logits
    try:
        whole_graph(two)(**given)
    except torch._dynamo.exc.InternalTorchDynamoError:
        pytest.skip("this release of PyTorch (2.11) makes no graph of the plain model either")
    with reroute.enable(two.model, keep=1.0) as handle:
        compiled = whole_graph(two)
        assert torch.equal(compiled(**given).logits, plain)
        with (
            handle.at(schedule=HALF),
            pytest.raises(torch._dynamo.exc.Unsupported, match="reroute plans and routes"),
        ):
            compiled(**given)
        assert torch.equal(compiled(**given).logits, plain)


@pytest.mark.slow
@pytest.mark.usefixtures("forgetting")
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_of_both_kinds(two: Tiny) -> None:
    """One function that is compiled is the plain model's, and routed inside of ``at``."""
    given = {**two.inputs([prompt(two)]), "use_cache": False}
    plain = two.model(**given).logits
    with reroute.enable(two.model, schedule=HALF):
        routed = two.model(**given).logits
    compiled: Any = torch.compile(two.model, backend="eager")
    with reroute.enable(two.model, keep=1.0) as handle:
        for _ in range(2):
            assert torch.equal(compiled(**given).logits, plain)
            with handle.at(schedule=HALF):
                torch.testing.assert_close(compiled(**given).logits, routed)


@pytest.mark.slow
@pytest.mark.usefixtures("forgetting")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_one_graph_of_text(name: str) -> None:
    tiny = models.llava(layers=2) if name == "llava" else models.qwen(layers=2)
    given = {**tiny.inputs([tiny.prompt(0, 9)]), "use_cache": False}
    plain = tiny.model(**given).logits
    with reroute.enable(tiny.model, keep=1.0):
        assert torch.equal(whole_graph(tiny)(**given).logits, plain)


class Logits(nn.Module):
    """Something to export."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Any) -> Tensor:
        logits: Tensor = self.model(**given, use_cache=False).logits
        return logits


@pytest.mark.usefixtures("forgetting")
@pytest.mark.filterwarnings("ignore")
def test_export(two: Tiny) -> None:
    """What is exported knows nothing of routing; what is routed cannot be exported."""
    given = two.inputs([prompt(two)])
    plain = two.model(**given).logits
    with reroute.enable(two.model, keep=1.0) as handle:
        program = torch.export.export(Logits(two.model), (), given)
        assert "reroute" not in str(program.graph)
        with handle.at(schedule=HALF), pytest.raises(RerouteError, match="A routed model cannot be exported"):
            torch.export.export(Logits(two.model), (), given)
    torch.testing.assert_close(program.module()(**given), plain)
    with reroute.enable(two.model, schedule=HALF), pytest.raises(RerouteError, match="cannot be exported"):
        torch.export.export(Logits(two.model), (), given)


@pytest.mark.slow
@pytest.mark.usefixtures("forgetting")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_compiled_generation(name: str) -> None:
    """Which ``generate`` does with a static cache, where there is a compiler for the device."""
    tiny = models.llava(layers=2) if name == "llava" else models.qwen(layers=2)
    config = CompileConfig(backend="eager", fullgraph=True)
    setattr(config, "_compile_all_devices", True)  # noqa: B010  # as tests of Transformers do
    run = functools.partial(generated, tiny, cache_implementation="static", compile_config=config)
    plain = run()
    with reroute.enable(tiny.model, keep=1.0) as handle:
        assert same(run(), plain)
        assert handle.totals().prefills == 1


# --- continuous batching ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen", marks=pytest.mark.slow)])
def test_continuous_batching(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``generate_batch`` has a paged cache and takes text only: it is the plain model's whatever ``keep`` is."""
    batching = pytest.importorskip("transformers.generation.configuration_utils")
    if models.TRANSFORMERS < (5, 24):
        pytest.skip("this release of Transformers finds no memory for it on a CPU")
    # Elsewhere among the tests a device of no module is made up.
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: torch.cpu)
    tiny = small(family)
    made: Any = GenerationConfig
    config = made(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=models.PAD)
    pages = batching.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    prompts = [list(tiny.prompt(0, 5).ids), [5, models.PICTURE, 6]]

    def run() -> list[list[int]]:
        results = tiny.model.generate_batch(
            prompts, generation_config=config, progress_bar=False, continuous_batching_config=pages
        )
        assert all(result.error is None for result in results.values())
        return [results[key].generated_tokens for key in sorted(results)]

    logging.disable(logging.INFO)
    try:
        plain = run()
        for settings in ({"keep": 1.0}, {"schedule": schedule(FEW)}):
            with reroute.enable(tiny.model, **settings) as handle:
                assert run() == plain
                assert handle.totals().prefills == 0
    finally:
        logging.disable(logging.NOTSET)


def test_rules_that_keep_all_are_recognised() -> None:
    """The cases above are those of a plan that changes nothing, not of one that would rank."""
    tiny = small("llava")
    with enable(tiny, Rules((1, 3), (1.0, 1.0))) as handle:
        assert handle._router.settings.keeps_all
    with enable(tiny, Rules((1, 3), (1.0, 0.99))) as handle:
        assert not handle._router.settings.keeps_all
