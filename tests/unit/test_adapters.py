from __future__ import annotations

from typing import Any

import models
import pytest
import torch
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen3Config

from reroute.transformers import adapter_of
from reroute_kernels import RopeTables, SelectMetadata, SelectRows
from reroute_kernels.reference import score_topk


@pytest.fixture(scope="module")
def model() -> Any:
    """A LLaVA whose decoder norms each query and key head."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text = Qwen3Config(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64)
    vision = CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=8, patch_size=4)
    config = LlavaConfig(vision_config=vision, text_config=text)
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")  # type: ignore[no-untyped-call]
    model.eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.uniform_(parameter, *((0.5, 2) if name.endswith("_norm.weight") else (-0.5, 0.5)))
    return model


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
def test_scores_of_a_decoder_with_key_norms_are_its_attention(model: Any, layer: int) -> None:
    adapter, length = adapter_of(model), 11
    out = adapter.text(torch.arange(length)[None] + 3, output_attentions=True, output_hidden_states=True)
    rows, ids, last = out.hidden_states[layer][0], torch.arange(length)[None], torch.tensor([length - 1])
    norm = adapter.input_norm(layer)
    assert norm is not None
    assert torch.equal(norm(rows), adapter.normalise(layer, rows))
    cos, sin = adapter.rope_tables(rows, ids)
    tables = RopeTables(cos[0], sin[0], last)
    query, keys = adapter.project(layer, adapter.normalise(layer, rows), tables)
    got = score_topk(
        query,
        keys,
        tables,
        SelectRows(ids, ids[:, :0], ids[0], SelectMetadata((0,), (length,), (length,), (0,), (1,))),
        adapter.attention_spec(layer),
    )
    torch.testing.assert_close(got.scores[0], out.attentions[layer][0, :, -1].mean(0))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_input_norms_are_known_unless_somebody_changed_them(name: str) -> None:
    tiny = getattr(models, name)(layers=3)
    adapter = adapter_of(tiny.model)
    rows, module = torch.randn(7, adapter.text_config.hidden_size), adapter.layers[1].input_layernorm
    norm = adapter.input_norm(1)
    assert norm is not None
    assert torch.equal(norm(rows), module(rows))
    hook = module.register_forward_hook(lambda *_: None)
    assert adapter.input_norm(1) is None
    hook.remove()
    module.forward = lambda x: x * 2
    assert adapter.input_norm(1) is None
    assert torch.equal(adapter.normalise(1, rows), rows * 2)
    assert adapter.input_norm(2) is not None


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_arguments_of_a_compiled_base_model(name: str) -> None:
    """What torch.compile returns takes anything, by its signature."""
    model = getattr(models, name)(layers=1).model
    plain = adapter_of(model).base_parameters
    model.model = torch.compile(model.model, backend="eager")
    assert adapter_of(model).base_parameters == plain
