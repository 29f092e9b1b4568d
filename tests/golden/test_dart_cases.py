"""DART as its authors' code computes it: selections of given tensors, and a decoder of given weights, decoding too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CACHE
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import reroute
from reroute.methods import DART
from reroute.rankers import Duplication
from reroute.rankers.duplication import picks_by_pivots, shares_of_pivots

HERE = Path(__file__).parent


def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its parameters and its tensors."""
    parameters: dict[str, Any] = json.loads((HERE / name / "case.json").read_text())["params"]
    return parameters, load_file(HERE / name / "case.safetensors")


@pytest.mark.parametrize("name", ["method_dart", "method_dart_budget37"])
def test_selections(name: str) -> None:
    its, given = case(name)
    states, begin, end = given["in.states"][0], its["visual_start"], its["visual_start"] + its["N"]
    visual, text = given["out.pivots_visual"], states[end:][given["out.pivots_text"]]
    norms = given["in.keys"][0].abs().sum((0, 2))
    assert torch.equal(norms[begin:end].sort(descending=True, stable=True).indices[:4], visual)
    for code in ("llava", "qwen"):
        k = 4 + 8 * its[f"t_{code}"]
        picks = picks_by_pivots(states[begin:end], visual, text, k)
        assert torch.equal(picks.sort().values, given[f"out.kept_{code}_canonical"])
        if code == "llava":
            assert torch.equal(picks[4:].view(8, -1), given["out.per_pivot"])


def test_on_a_circle() -> None:
    """T14."""
    angles = torch.tensor([0.0, 20, 80, 95, 150, 175]) * (math.pi / 180)
    points = torch.stack([angles.cos(), angles.sin()], 1)
    picks = picks_by_pivots(points, torch.tensor([1]), torch.tensor([[0.0, 1.0]]), 5)
    assert picks.tolist() == [1, 5, 4, 0, 2]


@pytest.mark.parametrize(("n", "k"), [(4, 4), (5, 4), (6, 3), (9, 9), (3, 0)])
def test_equal_tokens(n: int, k: int) -> None:
    """They are picked once each, the first ones first; a remainder goes to the first pivots."""
    picks = picks_by_pivots(torch.ones(n, 8), torch.tensor([2, 1])[:k], torch.ones(1, 8), k)
    assert picks.tolist() == [2, 1, 0, *range(3, n)][:k]


def test_shares() -> None:
    assert shares_of_pivots(19, 8) == [3, 3, 3, 2, 2, 2, 2, 2]
    assert shares_of_pivots(0, 0) == []


def test_released_counts() -> None:
    for budget, kept in ((128, 132), (64, 68), (192, 196), (37, 36)):
        assert DART.official(budget).schedule(32, "remove").counts(576) == (kept,)
    assert DART().schedule(32, "remove").per_layer(576, 32) == [576] * 2 + [132] * 30  # 159.75 on average


def model_of(its: dict[str, Any], given: dict[str, Tensor]) -> Any:
    """The decoder of the case, in a LLaVA whose tower is never called."""
    text = LlamaConfig(
        vocab_size=its["vocab"],
        hidden_size=its["d"],
        intermediate_size=its["mlp"],
        num_hidden_layers=its["layers"],
        num_attention_heads=its["heads"],
        num_key_value_heads=its["kv_heads"],
        rms_norm_eps=its["rms_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": its["rope_theta"]},
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=8
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=its["vocab"])
    model: Any = LlavaForConditionalGeneration(config)
    weights = {name[2:]: weight for name, weight in given.items() if name.startswith("w.")}
    model.lm_head.load_state_dict({"weight": weights.pop("lm_head.weight")})
    decoder = {name.removeprefix("model."): weight for name, weight in weights.items()}
    model.model.language_model.load_state_dict(decoder)
    return model.eval().requires_grad_(False)


def test_a_decoder() -> None:
    its, given = case("method_dart_e2e")
    model, n = model_of(its, given), its["N"]
    length = given["in.embeds"].shape[1]
    ids = torch.ones(1, length, dtype=torch.int64)
    ids[0, its["visual_start"] : its["visual_start"] + n] = its["vocab"]
    ranker = Duplication(visual=its["pivots_visual"], text=its["pivots_text"])
    method = DART(layer=its["K"], ratio=len(given["out.kept_canonical"]) / n, ranker=ranker)
    with reroute.enable(model, method=method, action="remove", trace=True) as handle:
        with handle.using(handle.plan(ids)):
            out = model(inputs_embeds=given["in.embeds"], use_cache=True)
        assert handle.trace is not None
        assert torch.equal(handle.trace[0].kept[0], given["out.kept_canonical"])
        cache, logits = getattr(out, CACHE), [out.logits[0, -1]]
        assert [layer.keys.shape[-2] for layer in cache.layers] == [45, 45, 27, 27]
        for place, token in enumerate(given["in.decode_tokens"], length):
            step = {"position_ids": torch.tensor([[place]]), CACHE: cache}
            logits.append(model(token[None, None], **step).logits[0, -1])
    torch.testing.assert_close(torch.stack(logits), given["out.logits_canonical"], rtol=0, atol=1e-4)
