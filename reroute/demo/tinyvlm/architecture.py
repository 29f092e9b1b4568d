"""The architecture: a small but real `LlavaForConditionalGeneration`, randomly initialised."""

from __future__ import annotations

from typing import Final

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from . import vocabulary as vocab
from .scenes import PATCH, PATCHES, SIDE

WIDTH: Final = 128
HEADS: Final = 4
LAYERS: Final = 12
VISION_LAYERS: Final = 4


def config(layers: int = LAYERS, width: int = WIDTH, vision_layers: int = VISION_LAYERS) -> LlavaConfig:
    """Configuration of the model; the arguments make a smaller one for tests."""
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_layers,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        projection_dim=width,
        hidden_act="gelu",
    )
    text = LlamaConfig(
        vocab_size=len(vocab.WORDS),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        bos_token_id=vocab.BOS,
        eos_token_id=vocab.EOS,
        pad_token_id=vocab.PAD,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab.IMAGE,
        image_seq_length=PATCHES,
        projector_hidden_act="gelu",
        # The last layer without the class token: every patch is one visual token.
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build(configuration: LlavaConfig, seed: int) -> LlavaForConditionalGeneration:
    """A float32 model with random weights that follow from the seed."""
    configuration._attn_implementation = "sdpa"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(configuration)
