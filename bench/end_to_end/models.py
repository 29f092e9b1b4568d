"""The model that is measured: a LLaVA with random weights whose decoder has real proportions."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from reroute import Schedule

__all__ = ["CACHE", "LLAVA_7B", "QUICK", "SCHEDULE", "STANDARD", "Size", "build", "inputs_of", "take_encoded", "twin"]

SCHEDULE = Schedule(layers=(1, 3, 5), ratios=(0.2, 0.2, 0.2))
"""Deep cuts from early on, so that what routing itself costs shows as much as it can."""

IMAGE_ID = 0
CACHE = "cache" if "cache" in inspect.signature(LlavaForConditionalGeneration.forward).parameters else "past_key_values"
"""What this release of Transformers calls the cache."""


@dataclass(frozen=True)
class Size:
    """Sizes of the decoder; the picture is a square of ``side`` x ``side`` visual tokens."""

    layers: int = 8
    hidden: int = 1024
    heads: int = 16
    intermediate: int = 2752
    side: int = 24
    text: int = 64

    @property
    def visual(self) -> int:
        """Visual tokens N."""
        return self.side**2

    @property
    def length(self) -> int:
        """Prompt length L."""
        return self.visual + self.text

    def with_side(self, side: int) -> Size:
        """The same decoder on another picture."""
        return replace(self, side=side)


STANDARD = Size()
QUICK = Size(layers=6, hidden=128, heads=4, intermediate=352, side=12)
LLAVA_7B = Size(layers=32, hidden=4096, heads=32, intermediate=11008)


def build(size: Size, dtype: torch.dtype = torch.float32) -> LlavaForConditionalGeneration:
    """A seeded model in evaluation mode. Vocabulary and vision tower are tiny: they are the same on both sides."""
    torch.manual_seed(0)
    text = {
        "model_type": "llama",
        "num_hidden_layers": size.layers,
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "intermediate_size": size.intermediate,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
    }
    vision = {
        "model_type": "clip_vision_model",
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 1,
        "intermediate_size": 32,
        "patch_size": 14,
        "image_size": 14 * size.side,
    }
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE_ID, image_seq_length=size.visual
    )
    build_from: Any = AutoModelForImageTextToText.from_config
    model: LlavaForConditionalGeneration = build_from(config, dtype=dtype)
    model.eval()  # type: ignore[no-untyped-call]
    return model


def twin(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """A second model on the same parameters, so that one can be routed while the other stays plain."""
    shared: dict[int, nn.Parameter] = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, shared)


def take_encoded(model: Any) -> None:
    """Let ``pixel_values`` (n, C) of ``model`` be features already: on any release of Transformers no tower runs."""

    def features(pixel_values: torch.Tensor, *args: Any, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=[pixel_values])  # type: ignore[arg-type]

    model.model.get_image_features = features


def inputs_of(size: Size, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One prompt: some text, a picture, a question. The picture comes encoded, so that no vision tower runs."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 512, (1, size.length), generator=generator)
    ids[:, 8 : 8 + size.visual] = IMAGE_ID
    features = 0.02 * torch.randn(size.visual, size.hidden, generator=generator)
    picture = BaseModelOutputWithPooling(pooler_output=[features.to(dtype)])  # type: ignore[arg-type]
    return {"input_ids": ids, "mm_encoder_outputs": {"image": picture}, "use_cache": True, "logits_to_keep": 1}
