"""Nüwa as its authors' code computes it: stage 1 of given tensors, stage 2 and all of it on models of given weights."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from given import case, close, llava_around
from models import CACHE
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import reroute
from reroute.methods import Nuwa
from reroute.rankers import RankInputs, ScoreRanker
from reroute.rankers.region_anchors import _pillars, aggregate, are_anchors, collecting_weights, quantile

# --- stage 1 on given tensors -----------------------------------------------------------------------------------------


def test_stage_1_of_llava() -> None:
    parameters, given = case("nuwa_llava_stage1_t64")
    grid, k, reach = tuple(parameters["grid"]), parameters["K1_per_image"], parameters["tau"]
    states = given["in.hidden_states_16_24"][:, 0, 1:]
    salience = given["in.cls_attention"][0, :, 1:].sum(0)
    close(salience, given["out.metric"][0], 1e-6)
    anchors = are_anchors(salience, grid, k).nonzero().flatten()
    assert torch.equal(anchors, given["out.anchors"][0])
    close(quantile(salience[anchors], 0.55), given["out.threshold"][0, 0], 1e-6)
    pillars = _pillars(salience[anchors], 0.55)
    assert torch.equal(pillars, given["out.pillar"][0])
    rules = (anchors, pillars, grid, reach, True)
    close(collecting_weights(states.mean(0), *rules), given["out.weights"][0], 1e-6)
    close(aggregate(states[7], states.mean(0), *rules), given["out.aggregated"][0], 2e-5)


def test_stage_1_by_hand() -> None:
    """T11."""
    rows = [(0.9, 0.1, 0.2, 0.3), (0.2, 0.1, 0.8, 0.1), (0.1, 0.7, 0.4, 0.2), (0.05, 0.1, 0.1, 0.6)]
    salience, features = torch.tensor(rows).flatten(), torch.arange(1.0, 17.0)[:, None]
    assert are_anchors(salience, (4, 4), 4, 1).nonzero().flatten().tolist() == [0, 6, 9, 15]
    anchors = are_anchors(salience, (4, 4), 3, 1).nonzero().flatten()
    assert anchors.tolist() == [0, 6, 9]
    assert float(quantile(salience[anchors], 0.55)) == pytest.approx(0.81)
    pillars = _pillars(salience[anchors], 0.55)
    assert pillars.tolist() == [True, False, False]
    for keeps_self, expected in ((True, (1, 12.698701, 17.826569)), (False, (1, 7.129472, 9.870529))):
        taken = aggregate(features, torch.ones(16, 1), anchors, pillars, (4, 4), 5**0.5, keeps_self)
        close(taken.flatten(), torch.tensor(expected), 1e-5)


def test_quantiles() -> None:
    """T19."""
    for values, expected in (((0.9, 0.7, 0.8), 0.81), ((4, 1, 3, 2), 2.65), ((5,), 5)):
        assert float(quantile(torch.tensor(values), 0.55)) == pytest.approx(expected)
        assert float(quantile(torch.tensor(values), 0.55)) == float(torch.tensor(values).float().quantile(0.55))
    assert float(quantile(torch.arange(21.0), 0.55)) == 11
    assert _pillars(torch.arange(21.0), 0.55).sum() == 10


# --- models of given weights ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Given(ScoreRanker):
    """Keeps what it is told to."""

    tokens: tuple[int, ...] = ()

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        chosen = torch.zeros(len(inputs.hidden[0]))
        chosen[list(self.tokens)] = 1
        return [chosen]


@functools.cache
def llava() -> Any:
    its, given = case("nuwa_llava_llm_stage2_n112")
    return llava_around(
        given,
        intermediate_size=its["intermediate"],
        num_hidden_layers=its["layers"],
        num_attention_heads=its["heads"],
        num_key_value_heads=its["kv_heads"],
        rms_norm_eps=its["rms_norm_eps"],
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_stage_2_of_llava(attention: str) -> None:
    its, given = case("nuwa_llava_llm_stage2_n112")
    model, patches = llava(), its["original_patches"]
    model.set_attn_implementation(attention)
    before, after = given["in.text_ids"].split([its["image_start"], its["text_after"]])
    ids = torch.cat([before, torch.full((patches,), its["vocab"]), after])[None]
    embeds = model.get_input_embeddings()(ids)
    places = its["image_start"] + given["in.patch_index"]
    embeds[0, places] = given["in.visual"]
    first = Given(tuple(given["in.patch_index"].tolist()))
    method = Nuwa.official(64)
    method = Nuwa(method.ratios, layer=its["removal_before_layer"], first=first)
    with reroute.enable(model, method=method, action="remove", trace=True) as handle:
        with handle.using(handle.plan(ids)):
            out = model(inputs_embeds=embeds, use_cache=True)
        assert handle.trace is not None
        assert torch.equal(handle.trace[1].candidates[0], given["in.patch_index"])
        assert torch.equal(handle.trace[1].kept[0], given["in.patch_index"][given["out.kept"]])
        close(handle.trace[1].scores[0], given["out.score"], 1e-5)
        cache = getattr(out, CACHE)
        assert [layer.keys.shape[-2] for layer in cache.layers] == given["out.kv_len"].tolist()
        logits = [out.logits[0, -1]]
        for token in given["out.tokens"][:-1]:
            logits.append(model(token[None, None], **{CACHE: cache}).logits[0, -1])
    found = torch.stack(logits)[:, :-1]
    close(found, given["out.logits"], 2e-4)
    assert torch.equal(found.argmax(1), given["out.tokens"])


@functools.cache
def qwen() -> Any:
    its, given = case("nuwa_qwen_full_r050")
    lm, vision = its["lm"], its["vision"]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": lm["vocab"],
            "hidden_size": lm["hidden"],
            "intermediate_size": lm["mlp"],
            "num_hidden_layers": lm["layers"],
            "num_attention_heads": lm["heads"],
            "num_key_value_heads": lm["kv_heads"],
            "rms_norm_eps": lm["rms_eps"],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": lm["rope_theta"],
                "mrope_section": lm["mrope_section"],
            },
            "tie_word_embeddings": False,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        vision_config={
            "depth": vision["blocks"],
            "hidden_size": vision["hidden"],
            "intermediate_size": vision["mlp"],
            "num_heads": vision["heads"],
            "out_hidden_size": lm["hidden"],
            "patch_size": vision["patch"],
            "temporal_patch_size": vision["temporal_patch"],
            "spatial_merge_size": vision["merge"],
            "window_size": vision["window_merged"] * vision["merge"] * vision["patch"],
            "fullatt_block_indexes": vision["full_attention_blocks"],
            "hidden_act": vision["act"],
        },
        image_token_id=its["image_id"],
        vision_start_token_id=its["vision_start_id"],
        vision_end_token_id=its["vision_end_id"],
    )
    model: Any = Qwen2_5_VLForConditionalGeneration(config)
    names = {"w.visual.": "model.visual.", "w.model.": "model.language_model.", "w.": ""}
    weights = {}
    for name, weight in given.items():
        prefix = next((prefix for prefix in names if name.startswith(prefix)), None)
        if prefix is not None:
            weights[names[prefix] + name[len(prefix) :]] = weight
    model.load_state_dict(weights)
    model.generation_config.update(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_qwen(attention: str) -> None:
    its, given = case("nuwa_qwen_full_r050")
    model = qwen()
    model.set_attn_implementation(attention)
    ids = given["in.input_ids"][None]
    inputs = {
        "input_ids": ids,
        "pixel_values": given["in.pixels"],
        "image_grid_thw": given["in.grid_thw"],
        "mm_token_type_ids": (ids == its["image_id"]).long(),
    }
    decoder: list[Tensor] = []
    watch = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: decoder.append(args[0]))
    with reroute.enable(model, method=Nuwa.official(0.5), action="remove", trace=True) as handle:
        cache = getattr(model(**inputs, use_cache=True), CACHE)
        watch.remove()
        assert handle.trace is not None
        first, second = handle.trace
        assert torch.equal(first.kept[0], given["out.anchors"])
        chosen = first.scores[0][first.kept[0]]
        close(chosen, given["out.metric"][given["out.anchors"]], 1e-4)
        assert torch.equal(_pillars(chosen, its["quantile"]), given["out.pillar"])
        close(decoder[0][0, its["image_start"] :][: its["n1"]], given["out.aggregated"], 1e-4)
        assert torch.equal(second.kept[0], given["out.anchors"][given["out_causal.kept"]])
        close(second.scores[0], given["out_causal.score"], 1e-4)
        assert [layer.keys.shape[-2] for layer in cache.layers] == given["out_causal.kv_len"].tolist()
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    close(torch.cat(out.logits), given["out_causal.logits"], 3e-4)
    assert torch.equal(out.sequences[0, ids.shape[1] :], given["out_causal.tokens"])
