"""Models that are not all in one place.

Two devices are fake tensors: they know their device, and operations refuse to mix them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import models
import numpy as np
import pytest
import torch
from models import CACHE, Tiny
from oracle import Rules
from support import enable
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_map_only

from reroute.core.prefill import PositionTables
from reroute.rankers import Ranker, RankInputs, ScoreRanker
from reroute_kernels import Backend, resolve

LAYERS = 6


@dataclass(frozen=True)
class Norm(ScoreRanker):
    """What a ranker with scores of its own sees is where the pool is."""

    def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
        assert {x.device.index for x in (*inputs.hidden, inputs.query)} == {0}
        return [hidden.norm(dim=-1) for hidden in inputs.hidden]


@pytest.fixture(scope="module", autouse=True)
def _pair() -> None:
    """A kind of device that needs no driver; PyTorch without CUDA cannot even index fake tensors on a GPU."""
    setup = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if setup is None:
        pytest.skip("this PyTorch has no devices without a driver")
    if backend_registration._privateuse1_backend_name != "pair":
        setup("pair")
        # Autocast, and with it checkpoint in other tests of this process, asks every kind of device.
        torch.pair.get_amp_supported_dtype = list  # type: ignore[attr-defined]


def valueless(data: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> torch.Tensor:
    """In place of ``torch.tensor``, whose values a fake tensor would keep and copy to the device for real."""
    return torch.empty(np.shape(data), dtype=dtype, device=device)


def moving(forward: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """``forward`` with its arguments brought to ``device``, as accelerate's hooks bring them."""

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
        return forward(*args, **kwargs)

    return run


def put(module: nn.Module, device: torch.device, mode: FakeTensorMode) -> None:
    """Make ``module`` and its parts fake ones on ``device``, each of which brings its arguments there."""

    def fake(value: Tensor) -> Tensor:
        moved: Tensor = mode.from_tensor(value.detach()).to(device)
        return moved

    for part in module.modules():
        for name, value in part._parameters.items():
            part._parameters[name] = None if value is None else nn.Parameter(fake(value), requires_grad=False)
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else fake(buffer)
        if part is module or part._parameters or part._buffers:
            part.forward = moving(part.forward, device)


def spread(tiny: Tiny, mode: FakeTensorMode) -> tuple[torch.device, torch.device]:
    """Put half of the decoder's layers on each of two devices, and all else on the first."""
    first, second = (torch.device("pair", index) for index in (0, 1))
    text = tiny.model.model.language_model
    with mode:
        for part in (*text.children(), tiny.model.lm_head):
            if part is not text.layers:
                put(part, first, mode)
        for index, layer in enumerate(text.layers):
            put(layer, second if index >= LAYERS // 2 else first, mode)
    return first, second


@pytest.mark.parametrize("attention", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["llava", "qwen"])
@pytest.mark.parametrize(
    "rules",
    [
        Rules((1, 2, 4), (0.5, 0.25, 0.125)),
        Rules((4, 5), (0.5, 0.25)),  # all on the second device
        Rules((2, 4), (0.5, 0.25), score_layer_offset=-1),
        Rules((1, 2, 4), (0.5, 0.25, 0.125), "remove"),
    ],
)
@pytest.mark.parametrize("ranker", [None, Norm()])
def test_a_model_on_two_devices(
    name: str, rules: Rules, attention: str, ranker: Ranker | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch with fillers and padding, and a decoding step on its cache."""
    tiny = getattr(models, name)(layers=LAYERS, attention=attention)
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2)]
    given = tiny.inputs(samples)
    length, text = given["input_ids"].shape[1], tiny.model.model.language_model
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    first, second = spread(tiny, mode)
    with enable(tiny, rules, ranker) as handle:
        plan = handle.plan(given["input_ids"], given["attention_mask"])
        monkeypatch.setattr(torch, "tensor", valueless)
        with handle.using(plan), mode:
            mask = torch.ones(2, 1, length, length, dtype=torch.bool, device=first)
            mask = mask if attention == "sdpa" else torch.zeros_like(mask, dtype=torch.float32)
            embeds = torch.empty(2, length, text.config.hidden_size, device=first)
            ids = torch.zeros(*((3,) if tiny.is_qwen else ()), 2, length, dtype=torch.int64, device=first)
            output = tiny.model(inputs_embeds=embeds, attention_mask=mask, position_ids=ids, use_cache=True)
        assert handle.stats().prefills == 1
        cache = getattr(output, CACHE)
        assert output.logits.shape[:2] == (2, length)
        assert [layer.keys.device for layer in cache.layers] == [first] * 3 + [second] * 3
        assert [layer.keys.shape[-2] for layer in cache.layers] == list(handle.stats().layer_lengths)
        with mode:
            mask = mask.new_zeros(2, 1, 1, length + 1)
            decoded = tiny.model(
                inputs_embeds=embeds[:, :1], attention_mask=mask, position_ids=ids[..., :1], **{CACHE: cache}
            )
        assert decoded.logits.shape[:2] == (2, 1)


@pytest.mark.parametrize(
    ("rules", "place"),
    [
        (Rules((1, 4), (0.5, 0.25)), 0),
        (Rules((4, 5), (0.5, 0.25)), 1),
        (Rules((5,), (0.25,), score_layer_offset=-1), 1),
    ],
)
def test_turns_that_choose_again_on_two_devices(rules: Rules, place: int) -> None:
    """States are kept where the layer gets them, and what goes with them where RoPE tables are."""
    tiny = models.llava(layers=LAYERS)
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2)]
    given, width = tiny.inputs(samples), tiny.model.config.text_config.hidden_size
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    places = spread(tiny, mode)
    with enable(tiny, rules, reopens=True) as handle:
        cache, mask, ids = None, given["attention_mask"], given["input_ids"]
        for _ in range(3):
            plan = handle.plan(ids, mask, cache)
            with pytest.MonkeyPatch.context() as patch, handle.using(plan), mode:
                patch.setattr(torch, "tensor", valueless)
                new, keys = ids.shape[1], mask.shape[1]
                embeds = torch.empty(2, new, width, device=places[0])
                seen = torch.ones(2, 1, new, keys, dtype=torch.bool, device=places[0])
                at = torch.zeros(2, new, dtype=torch.int64, device=places[0])
                rest: dict[str, Any] = {"use_cache": True} if cache is None else {CACHE: cache}
                output = tiny.model(inputs_embeds=embeds, attention_mask=seen, position_ids=at, **rest)
            cache = getattr(output, CACHE)
            assert [layer.keys.shape[-2] for layer in cache.layers] == list(handle.stats().layer_lengths)
            layer = next(layer for layer in cache.layers if getattr(layer, "earlier", None) is not None)
            kept = layer.earlier
            assert (kept.count, kept.hidden.device) == (keys, places[place])
            assert {kept.tables.cos.device, kept.is_visual.device} == {places[0]}
            # Planning reads which are visual, and fake tensors have no values.
            layer.earlier = replace(kept, is_visual=torch.ones(2, keys, dtype=torch.bool))
            ids = torch.ones(2, 3, dtype=torch.long)
            mask = torch.cat([mask, ids], 1)


def test_the_backend_is_chosen_again_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of the same kind: one of two GPUs may be too old for the kernels."""
    asked: list[torch.device] = []
    plain = resolve("torch", torch.device("cpu"))

    def resolved(name: str, device: torch.device) -> Backend:
        asked.append(device)
        return plain

    monkeypatch.setattr("reroute.config.resolve", resolved)
    places = [torch.device("pair", index) for index in (0, 1, 1, 0)]
    with enable(models.llava(layers=LAYERS), Rules((1,), (0.5,))) as handle, FakeTensorMode():
        for place in places:
            rows = torch.empty(1, 1, 64, device=place)
            assert handle._place(rows, PositionTables(rows, rows, None)).device == place
    assert asked == [torch.device("cpu"), places[0], places[1], places[0]]


def test_the_test_can_fail() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"two (different )?devices"):
        torch.empty(1, device="pair:0") + torch.empty(1, device="pair:1")
