"""As ``pictured``, of models whose parts are in other places, or all of whose layers slide."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers
from pictured import ROPE, TEXT, VISION, Pictured, made, patches, random
from tiny_types import LAYERS, LONG_WINDOW, MARKED, PICTURE, TYPES, VIDEO, WINDOW, TinyType, mend_llama4
from torch import Tensor
from tweaks import AUDIO

__all__ = ["ELSEWHERE", "chameleon"]

AUTO: Any = transformers  # whose annotations lack names of the same


def _llama4() -> Pictured:
    """The whole model is its own base. Four tokens for each tile."""
    mend_llama4()
    rotates = [0, 1, 0, 1, 0, 0]
    kinds = ["chunked_attention" if its else "full_attention" for its in rotates]
    chunks = {"layer_types": kinds, "no_rope_layers": rotates, "attention_chunk_size": WINDOW}
    experts = {"num_local_experts": 4, "intermediate_size_mlp": 48}
    sizes = {"intermediate_size": 128, "projector_input_dim": 16, "projector_output_dim": 16, "vision_output_dim": 16}
    config = transformers.Llama4Config(
        text_config={**TEXT, **chunks, **experts}, vision_config={**VISION, **sizes}, image_token_index=PICTURE
    )
    model = made("Llama4ForConditionalGeneration", config)
    pictures = lambda seed: {"pixel_values": random(seed, 1 + seed % 2, 3, 32, 32)}
    tokens = lambda given: 4 * len(given["pixel_values"])
    return Pictured(TinyType(model, model.language_model.model, 1), pictures, tokens)


def _idefics2() -> Pictured:
    text = AUTO.MistralConfig(**TEXT, sliding_window=LONG_WINDOW)
    resampler = {"resampler_n_latents": 6, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    config = AUTO.Idefics2Config(
        text_config=text,
        vision_config=dict(VISION),
        perceiver_config={"hidden_size": 32, "num_key_value_heads": 2, **resampler},
        image_token_id=PICTURE,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    model = made("Idefics2ForConditionalGeneration", config)
    pictures = lambda seed: {"pixel_values": random(seed, 1, 1, 3, 32, 32)}
    return Pictured(TinyType(model, model.model.text_model, 1), pictures, lambda given: 6)


def chameleon(**settings: Any) -> Pictured:
    """The decoder is its own base. Pictures are 3 x 3 codes of four, which have embeddings of their own."""
    codes = {f"IMGIMG{chr(ord('A') + i)}Z": 160 + i for i in range(4)}
    channels = {"base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1, "latent_channels": 32}
    config = transformers.ChameleonConfig(
        **{**TEXT, **settings},
        vocabulary_map={"<image>": PICTURE, **codes},
        vq_config={**channels, "num_embeddings": 4, "embed_dim": 8, "resolution": 6},
    )
    model = made("ChameleonForConditionalGeneration", config)
    pictures = lambda seed: {"pixel_values": random(seed, 1, 3, 6, 6)}
    return Pictured(TinyType(model, model.model, 1), pictures, lambda given: 9)


def _swin() -> Pictured:
    """Chameleon's larger model norms behind attention and MLP."""
    return chameleon(swin_norm=True)


def _kosmos2_5() -> Pictured:
    """Positions are embedded, and an argument marks the tokens of a picture."""
    text = {"vocab_size": TEXT["vocab_size"], "layers": LAYERS, "embed_dim": 32, "ffn_dim": 48, "attention_heads": 4}
    sizes = {"patch_embed_hidden_size": 12, "head_dim": 16, "max_num_patches": 64}
    config = transformers.Kosmos2_5Config(
        text_config={**text, "pad_token_id": 0, "max_position_embeddings": 512},
        vision_config={**VISION, **sizes},
        latent_query_num=9,
        tie_word_embeddings=False,
    )
    model = made("Kosmos2_5ForConditionalGeneration", config)
    tiny = TinyType(model, model.text_model.model, 1, MARKED["kosmos-2.5"])
    return Pictured(tiny, _patches, lambda given: 9, pads=False)


def _patches(seed: int) -> dict[str, Tensor]:
    """With the row and the column of each before its pixels."""
    patches = random(seed, 1, 8, 2 + 12)
    patches[..., :2] = patches[..., :2].abs().round()
    return {"flattened_patches": patches}


def _nemotron_h_omni() -> Pictured:
    """Layers are attentions, states or MLPs; decisions are before each kind of them but the last."""
    kinds = ["linear_attention", "mlp", "full_attention", "linear_attention", "full_attention", "full_attention"]
    states = {"mamba_num_heads": 4, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8}
    text = {name: value for name, value in TEXT.items() if name != "num_hidden_layers"}
    sizes = {"patch_dim": 192, "video_patch_dim": 384, "max_img_size": 64, "dtype": "float32"}
    config = AUTO.NemotronH_Omni_Reasoning_V3_Config(
        text_config={**text, **states, "layers_block_type": kinds, "model_type": "nemotron_h"},
        vision_config={**VISION, **sizes, "model_type": "radio", "video_temporal_patch_size": 2},
        vision_hidden_size=32,
        projector_hidden_size=16,
        image_token_id=PICTURE,
    )
    model = made("NemotronH_Omni_Reasoning_V3", config)
    return Pictured(
        TinyType(model, model.language_model.model, 1), _grid, lambda given: len(given["pixel_values"]) // 4
    )


def _grid(seed: int) -> dict[str, Tensor]:
    """Patches, merged 2 x 2."""
    rows = 4 + 2 * (seed % 2)
    return {"pixel_values": random(seed, rows * 4, 3 * 8 * 8), "image_grid_hw": torch.tensor([[rows, 4]])}


def _qwen2_5_omni() -> Pictured:
    """Before Transformers 5.24 the whole model is its own base, and its child ``model`` the decoder."""
    sizes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    tokens = {"image_token_id": PICTURE, "video_token_id": VIDEO, "audio_token_id": AUDIO}
    config = AUTO.Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**sizes, "intermediate_size": 48, "patch_size": 4, "fullatt_block_indexes": [0]},
        audio_config={"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
        **tokens,
        vision_start_token_id=AUDIO + 1,
    )
    model = made("Qwen2_5OmniThinkerForConditionalGeneration", config)
    text = getattr(model.model, "language_model", model.model)
    return Pictured(TinyType(model, text, 3), patches, lambda given: len(given["pixel_values"]) // 4)


MADE = (
    _llama4,
    _idefics2,
    chameleon,
    _swin,
    _kosmos2_5,
    _qwen2_5_omni,
    *[_nemotron_h_omni] * ("nemotron_h_omni" in TYPES),
)
ELSEWHERE: dict[str, Callable[[], Pictured]] = {make.__name__.strip("_"): functools.cache(make) for make in MADE}
