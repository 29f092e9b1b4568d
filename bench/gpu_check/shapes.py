"""Models with decoders of real sizes, random weights and a tiny vision tower, and prompts that begin embedded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, LlavaConfig, Qwen2_5_VLConfig

from reroute.core.cost import ModelShape, kv_bytes
from reroute_kernels.testing.cases import TEXT

from ..end_to_end.flops import DECODERS
from ..end_to_end.models import IMAGE_ID, take_encoded
from .lines import MODEL_NAMES

__all__ = ["SHAPES", "Prompt", "build", "fitting", "memory_of_prefill", "memory_of_weights", "position_ids"]

SHAPES = {
    "tiny-llava": ModelShape(12, 64, 96, 4, 4, 16, 512),
    "tiny-qwen": ModelShape(12, 64, 96, 4, 2, 16, 512),
    **{model: DECODERS[name] for model, name in MODEL_NAMES.items() if name in DECODERS},
}
BEFORE = 35  # text tokens before the picture, as the system prompt of LLaVA; the question comes after it
LONGEST = 1 << 17  # positions
ROOM = 8 << 30  # bytes to be left beside the weights, or fewer layers are built


def build(model: str, shape: ModelShape, device: torch.device, dtype: torch.dtype) -> Any:
    """The real class of Transformers, in evaluation mode. Its weights are drawn on the device: that is quickest."""
    torch.manual_seed(0)
    config = _llava(shape) if "llava" in model else _qwen(shape)
    build_from: Any = AutoModelForImageTextToText.from_config
    with torch.device(device):
        network = build_from(config, dtype=dtype, attn_implementation="sdpa")
    take_encoded(network)
    return network.eval().requires_grad_(False)


def fitting(shape: ModelShape, free: float, itemsize: int) -> ModelShape:
    """``shape``, with fewer layers where its weights would leave too little of ``free`` bytes."""
    layers = shape.num_layers
    while layers > 1 and memory_of_weights(replace(shape, num_layers=layers), itemsize) + ROOM > free:
        layers -= 1
    return replace(shape, num_layers=layers)


def memory_of_weights(shape: ModelShape, itemsize: int) -> int:
    """Bytes."""
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layer = shape.hidden * (2 * query + 2 * key) + 3 * shape.hidden * shape.intermediate
    return itemsize * (shape.num_layers * layer + 2 * shape.vocab * shape.hidden)


def memory_of_prefill(shape: ModelShape, lengths: list[int], batch: int, itemsize: int) -> int:
    """Bytes that a prefill adds to the weights at most: its cache, and the rows of its widest layer in the MLP."""
    rows = batch * max(lengths)
    activations = itemsize * rows * (3 * shape.intermediate + 6 * shape.hidden)
    return batch * kv_bytes(shape, lengths, itemsize) + activations


class Prompt:
    """``batch`` prompts of ``visual`` tokens between 35 and 25 of text, all of one arrangement."""

    def __init__(self, network: Any, visual: int, batch: int, device: torch.device) -> None:
        """Its pictures are values without meaning."""
        width, length = network.config.get_text_config().hidden_size, visual + TEXT
        self.ids = torch.full((batch, length), IMAGE_ID + 1, device=device)
        self.ids[:, BEFORE : BEFORE + visual] = IMAGE_ID
        embeds = 0.05 * torch.randn(batch, length, width, device=device, dtype=network.dtype)
        ids = position_ids(network, batch, length)  # Qwen2.5-VL would compute them on the host
        self.given: dict[str, Any] = {"inputs_embeds": embeds, "position_ids": ids}
        self.given |= {"use_cache": True, "logits_to_keep": 1}
        features = 0.05 * torch.randn(batch * visual, width, device=device, dtype=network.dtype)
        self._tokens = {"input_ids": self.ids, "pixel_values": features}

    @property
    def asked(self) -> dict[str, Any]:
        """The same prompts as a user has them: nothing is embedded or planned. Pictures are encoded (``build``)."""
        others = {name: value for name, value in self.given.items() if name != "inputs_embeds"}
        return {**others, **self._tokens}


def position_ids(network: Any, batch: int, length: int) -> torch.Tensor:
    """(B, L), or (3, B, L) with M-RoPE, of a prompt without padding."""
    ids = torch.arange(length, device=network.device).expand(batch, -1)
    return ids.expand(3, -1, -1).contiguous() if "Qwen" in type(network).__name__ else ids


def _llava(shape: ModelShape) -> LlavaConfig:
    vision = {"model_type": "clip_vision_model", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 1}
    vision |= {"intermediate_size": 32, "patch_size": 14, "image_size": 28}
    text = {"model_type": "llama", **_text(shape)}
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_ID, tie_word_embeddings=False)


def _qwen(shape: ModelShape) -> Qwen2_5_VLConfig:
    eighth = shape.head_dim // 16
    sections = [shape.head_dim // 2 - 6 * eighth, 3 * eighth, 3 * eighth]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    vision = {"depth": 1, "fullatt_block_indexes": [0], "hidden_size": 32, "intermediate_size": 32, "num_heads": 1}
    return Qwen2_5_VLConfig(
        text_config={**_text(shape), "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": shape.hidden},
        image_token_id=IMAGE_ID,
        tie_word_embeddings=False,
    )


def _text(shape: ModelShape) -> dict[str, Any]:
    return {
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": LONGEST,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
