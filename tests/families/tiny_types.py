"""Tiny random models of Transformers' image-text-to-text types, by their own default configurations.

The decoder is small and has random weights; all else of a model stays without weights, since only prompts without
pictures are run: routing looks at placeholders, whatever is merged there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from models import _gain
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from tweaks import (
    AUDIO,
    LAYERS,
    LONG_WINDOW,
    PICTURE,
    SECTION,
    SIZES,
    TWEAKS,
    VIDEO,
    VOCABULARY,
    WINDOW,
    mend_llama4,
    read,
    set_windows,
)

__all__ = [
    "LAYERS",
    "LONG_WINDOW",
    "MARKED",
    "PICTURE",
    "RECURRENT",
    "SECTION",
    "SLIDING",
    "TYPES",
    "VIDEO",
    "VOCABULARY",
    "WINDOW",
    "TinyType",
    "axes_of",
    "build",
    "configuration",
    "fill",
    "mend_llama4",
]

TYPES: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
"""Every type and the name of its class."""
PLACES = {
    "kosmos-2.5": ("text_model", "model"),
    "llama4": ("language_model", "model"),
    "nemotron_h_omni": ("language_model", "model"),
}
"""Children that lead to the decoder, of types that have it elsewhere than in their child ``model``, or as that."""
SLIDING = (
    "aya_vision",
    "cohere2_vision",
    "cohere_compass",
    "exaone4_5",
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "idefics2",
    "llama4",
    "muse_glimmer",
    "muse_spark",
    "shieldgemma2",
    "step3p7",
    "unlimited_ocr",
)
"""Types of which some layers slide."""
RECURRENT = (
    "lfm2_vl",
    "lfm3_vl",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "nemotron_h_omni",
    "qwen3_5",
    "qwen3_5_moe",
)
"""Types of which some layers keep a state instead of keys."""
LOUD = (*RECURRENT, "muse_glimmer", "muse_spark")
"""Types whose fp32 noise is as large as can be borne: their norms are around what they are at first."""
MARKED = {"kosmos-2.5": "image_embeds_position_mask"}
"""By which argument a type is told which tokens are visual, where no id does."""
MARKS = {"ernie4_5_vl_moe": "moe_mm_token_type_ids", **MARKED}
"""By which argument a type's layers are told which tokens are of pictures."""


@dataclass(frozen=True, eq=False)
class TinyType:
    """A model, its decoder and the decoder's layers.

    ``axes``: how many position ids a token has, several of M-RoPE. ``marks``: by which argument it is told where
    pictures are, if it must be. ``later``: how many of the tokens after the prompt one of them sees, if not all.
    """

    model: Any = field(repr=False)
    text: Any = field(repr=False)
    axes: int
    marks: str | None = None
    later: int | None = None

    @property
    def layers(self) -> list[Any]:
        return list(self.text.layers)

    def spread(self, positions: Tensor) -> Tensor:
        """Position ids (B, L) as its decoder takes them."""
        return positions if self.axes == 1 else positions.expand(self.axes, -1, -1)


def configuration(kind: str, layers: int = LAYERS) -> Any:
    """The default configuration of a type, with a small decoder."""
    config = CONFIG_MAPPING[kind]()
    text = config.get_text_config()
    for name, size in SIZES.items():
        if isinstance(read(text, name), int):
            setattr(text, name, size)
    text.num_hidden_layers, text.pad_token_id = layers, 0
    kinds = read(text, "layer_types")
    if kinds:
        text.layer_types = (kinds * layers)[:layers]
    rope = read(text, "rope_parameters")
    if rope and "rope_type" in rope:
        text.rope_parameters = {**rope, "mrope_section": SECTION}
    vision = read(config, "vision_config")
    for name in ("depth", "num_hidden_layers"):
        if isinstance(read(vision, name), int):
            setattr(vision, name, 1)
    if read(config, "video_token_id") is not None:
        config.video_token_id = VIDEO
    if read(config, "audio_token_id") is not None:
        config.audio_token_id = AUDIO
    if kind not in MARKED:
        config.image_token_id = PICTURE  # last: it may be another name of the same
    if kind in SLIDING:
        set_windows(config)
    if kind in TWEAKS:
        TWEAKS[kind](config)
    return config


@functools.cache
def build(kind: str, attention: str = "eager", layers: int = LAYERS) -> TinyType:
    """A shared model of a type: whoever changes it restores it."""
    with torch.device("meta"):
        model: Any = getattr(transformers, TYPES[kind])(configuration(kind, layers)).eval()
    if kind in PLACES:
        *path, name = PLACES[kind]
    elif hasattr(model.model, "layers"):
        path, name = [], "model"
    else:
        path, name = ["model"], "language_model" if hasattr(model.model, "language_model") else "text_model"
    base = functools.reduce(getattr, path, model)
    headed = model if path in ([], ["model"]) else getattr(model, path[0])
    text: Any = type(getattr(base, name))(model.config.get_text_config()).eval()
    setattr(base, name, text)
    for owner in {base, model}:
        for other, module in list(owner.named_children()):
            if not any(part is text or part is headed for part in module.modules()):
                setattr(owner, other, nn.Identity())
    headed.lm_head = nn.Linear(text.config.hidden_size, VOCABULARY, bias=False)
    if kind in LOUD:
        fill(text, headed.lm_head, centre=lambda weight: float(weight.mean()))
    else:
        fill(text, headed.lm_head)
    model.requires_grad_(False)
    model.set_attn_implementation(attention)
    return TinyType(model, text, axes_of(text), MARKS.get(kind), WINDOW if kind == "unlimited_ocr" else None)


def axes_of(text: Any) -> int:
    sections = getattr(getattr(text, "rotary_emb", None), "mrope_section", None) or [0]
    return len(next(iter(sections.values())) if isinstance(sections, dict) else sections)


def fill(*modules: nn.Module, centre: Callable[[Tensor], float] = lambda _: 1.0) -> None:
    """Random weights; those of norms are around their ``centre``."""
    generator = torch.Generator().manual_seed(0)
    for module in modules:
        for name, weight in module.named_parameters():
            values = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                values = 0.2 * values + (centre(weight.data) if "norm" in name else 0.0)
            elif "embed" not in name:
                values *= _gain(name) / _fan_in(weight) ** 0.5
            weight.data.copy_(values)


def _fan_in(weight: Tensor) -> int:
    return int(weight.shape[-1])
