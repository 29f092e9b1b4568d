"""Cases made with authors' code: their parameters and tensors, and a LLaVA around the weights of a case."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

HERE = Path(__file__).parent


@functools.cache
def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its parameters and its tensors."""
    parameters: dict[str, Any] = json.loads((HERE / name / "case.json").read_text())["params"]
    return parameters, load_file(HERE / name / "case.safetensors")


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def llava_around(given: Mapping[str, Tensor], **sizes: Any) -> Any:
    """The decoder of these weights (``w.…``) and ``sizes``, in a LLaVA whose tower is never called.

    The id of its pictures is the one behind the vocabulary of the case.
    """
    vocabulary, hidden = given["w.model.embed_tokens.weight"].shape
    text = LlamaConfig(
        vocab_size=vocabulary + 1,
        hidden_size=hidden,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        **sizes,
    )
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=8
    )
    model: Any = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=vocabulary)
    )
    weights = {
        name[8:] if name.startswith("w.model.") else name[2:]: w for name, w in given.items() if name[:2] == "w."
    }
    padded = torch.zeros(1, hidden)
    head = torch.cat([weights.pop("lm_head.weight"), padded])
    weights["embed_tokens.weight"] = torch.cat([weights["embed_tokens.weight"], padded])
    model.model.language_model.load_state_dict(weights)
    model.lm_head.load_state_dict({"weight": head})
    return model.eval().requires_grad_(False)
