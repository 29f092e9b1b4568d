"""Four routed prefills with known results: kept tokens, scores, logits, cache lengths and greedy tokens."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import CACHE, Sample, Tiny
from oracle import Rules, predict
from safetensors.torch import load_file
from torch import Tensor

import reroute
from reroute.core.schedule import Action

HERE = Path(__file__).parent
CASES = ("llava_reroute", "llava_pdrop_remove", "qwen2_5_vl_reroute", "qwen3_vl_reroute")
"""The last one has three levels of DeepStack, and decides behind them."""


@dataclass(frozen=True)
class Case:
    """``logits`` (7, V): after the prompt, and after each of six greedy tokens. ``kept`` and ``scores``: per layer."""

    model: Any
    inputs: dict[str, Tensor]
    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    action: Action
    tokens: list[int]
    kv_lengths: list[int]
    kept: list[Tensor]
    scores: list[Tensor]
    logits: Tensor
    dense: Tensor

    @property
    def sample(self) -> tuple[Tiny, Sample]:
        """The same prompt for the oracle."""
        ids = self.inputs["input_ids"][0].tolist()
        visual = tuple(i for i, token in enumerate(ids) if token == self.model.config.image_token_id)
        grids = self.inputs.get("image_grid_thw", torch.empty(0)).tolist()
        return Tiny(self.model), Sample(tuple(ids), visual, (self.inputs["pixel_values"],), tuple(map(tuple, grids)))


@functools.cache
def load(name: str) -> Case:
    folder = HERE / name
    case = json.loads((folder / "case.json").read_text())
    tensors = load_file(folder / "case.safetensors")
    kind = getattr(transformers, case["model_class"])
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval().requires_grad_(False)
    layers = case["routing_layers"]
    return Case(
        model=model,
        inputs={key[3:]: value for key, value in tensors.items() if key.startswith("in.")},
        layers=tuple(layers),
        ratios=tuple(case["keep_ratios"]),
        action=case["action"],
        tokens=case["greedy_tokens"],
        kv_lengths=case["kv_lengths"],
        kept=[tensors[f"kept.{layer}"] for layer in layers],
        scores=[tensors[f"scores.{layer}"] for layer in layers],
        logits=tensors["logits"],
        dense=tensors["dense_logits"],
    )


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return load(request.param)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("given_as", ["method", "schedule"])
def test_golden(case: Case, attention: str, given_as: str) -> None:
    settings: dict[str, Any] = {"schedule": reroute.Schedule(case.layers, case.ratios)}
    if given_as == "method":
        settings = {"method": reroute.methods.PDrop(case.layers, case.ratios)}
    case.model.set_attn_implementation(attention)
    with reroute.enable(case.model, action=case.action, trace=True, **settings) as handle:
        cache = getattr(case.model(**case.inputs, use_cache=True), CACHE)
        assert [layer.keys.shape[-2] for layer in cache.layers] == case.kv_lengths
        for stage, layer, kept, scores in zip(handle.trace, case.layers, case.kept, case.scores, strict=True):
            assert stage.layer == layer
            assert torch.equal(stage.kept[0], kept)
            close(stage.scores[0], scores)
        out = case.model.generate(
            **case.inputs, max_new_tokens=7, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert out.sequences[0, case.inputs["input_ids"].shape[1] :][:6].tolist() == case.tokens
    close(torch.cat(out.logits), case.logits)
    close(case.model(**case.inputs).logits[0, -1], case.dense)


@pytest.mark.parametrize("name", CASES[:3])
def test_oracle_agrees(name: str) -> None:
    """It knows neither DeepStack nor norms of heads, which ``tests/families`` has another one for."""
    case = load(name)
    tiny, sample = case.sample
    rules = Rules(case.layers, case.ratios, case.action)
    result = predict(tiny, sample, rules, then=case.tokens)
    for decision, kept, scores in zip(result.decisions[0], case.kept, case.scores, strict=True):
        assert decision.kept == kept.tolist()
        close(decision.scores, scores)
    assert result.kv_lengths == [length + 6 for length in case.kv_lengths]
    close(result.logits[-7:], case.logits)
