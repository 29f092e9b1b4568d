"""What the default configuration of a type lacks to be tiny, or to show what is special about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from transformers.models.llama4 import modeling_llama4

__all__ = [
    "AUDIO",
    "LAYERS",
    "LONG_WINDOW",
    "PICTURE",
    "SECTION",
    "SIZES",
    "TWEAKS",
    "VIDEO",
    "VOCABULARY",
    "WINDOW",
    "mend_llama4",
    "read",
    "set_windows",
]

LAYERS, VOCABULARY, PICTURE, VIDEO, AUDIO = 6, 200, 150, 151, 152
SIZES: dict[str, int] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
WINDOW, LONG_WINDOW = 6, 20
SECTION = [2, 1, 1]
"""Of M-RoPE, for heads of 8 features."""


def read(config: Any, name: str) -> Any:
    """An attribute; None where there is none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


def _emu3(config: Any) -> None:
    config.vocabulary_map = {"<image>": PICTURE, "<|visual token 000000|>": PICTURE + 2}


def _granite4_vision(config: Any) -> None:
    config.deepstack_layer_map, config.spatial_target_layers, config.downsample_rate = [[-1, 1]], [2], "1/2"


def _clip_tower(config: Any) -> None:
    """Instead of one that needs timm."""
    config.vision_config = transformers.CLIPVisionConfig(num_hidden_layers=1)
    config.vision_config.model_args = {"embed_dim": 768}


def _deepseek_ocr2(config: Any) -> None:
    config.text_config.num_experts_per_tok = 2
    config.text_config.mlp_layer_types = ["dense", *["sparse"] * (config.text_config.num_hidden_layers - 1)]


def _aya_vision(config: Any) -> None:
    config.vision_config = transformers.SiglipVisionConfig(num_hidden_layers=1)


def _chameleon(config: Any) -> None:
    """Its decoder has the vision tower."""
    config.vocabulary_map = {"<image>": PICTURE}
    sizes = {"base_channels": 32, "channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 32}
    config.vq_config = type(config.vq_config)(**sizes)


def _cohere_compass(config: Any) -> None:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTION}
    config.text_config.rope_parameters = {"full_attention": rope, "sliding_attention": {**rope, "rope_theta": 100.0}}
    config.vision_config.deepstack_visual_indexes = [0, 1]


def _ernie4_5_vl_moe(config: Any) -> None:
    """Experts of two sizes, for text and for pictures."""
    text = config.text_config
    text.moe_intermediate_size, text.mlp_layer_types = [16, 24], ["dense", *["sparse"] * (text.num_hidden_layers - 1)]
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [1, 1, 2]}


def _glm4v_moe(config: Any) -> None:
    """Half of each head is rotated."""
    config.text_config.rope_parameters = {**config.text_config.rope_parameters, "mrope_section": [1, 1, 0]}


def _hunyuan_vl(config: Any) -> None:
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1, 1]}
    config.text_config.rope_parameters, config.text_config.head_dim = sections, 8


def _kimi_k25(config: Any) -> None:
    """Latent keys, of 4 rotated and 8 other features."""
    text = config.text_config
    text.q_lora_rank, text.kv_lora_rank, text.qk_rope_head_dim, text.qk_nope_head_dim, text.v_head_dim = 12, 16, 4, 8, 8
    text.head_dim, text.num_key_value_heads, text.n_group, text.topk_group = 4, 4, 1, 1
    text.first_k_dense_replace = 1


def _nemotron_h_omni(config: Any) -> None:
    """States, attention, MLPs and experts, in layers of their own."""
    text = config.text_config
    attends, state, layers = "full_attention", "linear_attention", text.layers_block_type
    text.layers_block_type = [state, "mlp", attends, state, "moe", "mlp", attends, state][: len(layers)]
    text.mamba_num_heads, text.mamba_head_dim, text.ssm_state_size, text.n_groups, text.chunk_size = 4, 8, 8, 2, 8
    text.moe_shared_expert_intermediate_size = 16
    config.audio_config = None


def _kosmos2_5(config: Any) -> None:
    text = config.text_config
    text.ffn_dim, text.attention_heads = 48, 4
    config.vision_config.num_hidden_layers = 1


def _lfm2_vl(config: Any) -> None:
    _set_kinds(config.text_config, "conv", "conv", "full_attention", "conv")


def _lfm3_vl(config: Any) -> None:
    """Convolutions, windows and two rotary tables in one decoder."""
    config.text_config.sliding_window = WINDOW
    _set_kinds(config.text_config, "conv", "sliding_attention", "full_attention", "conv")


def _qwen3_5(config: Any) -> None:
    """Half of each head is rotated. Not too many recurrent layers: their fp32 states are noisy."""
    text = config.get_text_config()
    attends = "full_attention"
    _set_kinds(text, "linear_attention", attends, attends, "linear_attention", attends, attends, attends)
    text.rope_parameters = {**text.rope_parameters, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}


def _set_kinds(text: Any, *kinds: str) -> None:
    text.layer_types = [*kinds * text.num_hidden_layers][: text.num_hidden_layers]


def set_windows(config: Any) -> None:
    """Windows that are shorter than prompts, and some full layers."""
    text = config.get_text_config()
    text.sliding_window = WINDOW
    if getattr(text, "layer_types", None) is not None:
        _set_kinds(text, "sliding_attention", "sliding_attention", "full_attention", "sliding_attention")


def _idefics2(config: Any) -> None:
    """All layers slide, so that some must see a whole prompt; not its answer too."""
    config.text_config.sliding_window = LONG_WINDOW


def _llama4(config: Any) -> None:
    """Chunks instead of windows. Full layers do not rotate, and scale queries of long prompts.

    The first one is full, for what begins a chunk has nothing that would tell tokens of a picture apart.
    """
    mend_llama4()
    text, chunks = config.text_config, "chunked_attention"
    text.sliding_window, text.attention_chunk_size, text.intermediate_size_mlp = None, WINDOW, 48
    _set_kinds(text, "full_attention", chunks)
    text.no_rope_layers = [int(kind == chunks) for kind in text.layer_types]


def mend_llama4() -> None:
    """The forward of Transformers 5.24.0 reads a field that the output of its own text model lacks."""
    module: Any = modeling_llama4
    if hasattr(module, "MoeCausalLMOutputWithPast"):
        module.MoeCausalLMOutputWithPast.image_outputs = None


def _unlimited_ocr(config: Any) -> None:
    """Windows are of what is generated alone. Heads do not share keys."""
    text = config.text_config
    text.num_key_value_heads = text.num_attention_heads
    _set_kinds(text, "reference_sliding_attention")
    text.mlp_layer_types = ["dense", *["sparse"] * (text.num_hidden_layers - 1)]


def _muse(config: Any) -> None:
    """Full layers have no rotary tables. A large factor on queries and experts would make noise loud."""
    set_windows(config)
    text = config.get_text_config()
    text.layer_rope_theta = [10000.0 * (kind == "sliding_attention") for kind in text.layer_types]
    text.qk_scale_factor, text.mlp_layer_types = 1.5, ["dense"] * text.num_hidden_layers


def _step3p7(config: Any) -> None:
    """Sliding layers have more heads; in full ones half of each head is rotated, slowly."""
    text = config.text_config
    rope = {"rope_type": "default", "rope_theta": 100.0}
    slow = {**rope, "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    names = ("num_hidden_layers", "layer_types", "sliding_window", "pad_token_id", *SIZES)
    sizes = {name: value for name in names if (value := read(text, name)) is not None}
    config.text_config = type(text)(
        **sizes,
        num_sliding_attention_heads=8,
        share_expert_dim=16,
        rope_parameters={"full_attention": slow, "sliding_attention": rope},
    )


def _gemma4(config: Any) -> None:
    """As the large ones are: full layers take keys for values, and nothing comes in between layers."""
    heads = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "hidden_size_per_layer_input": 0}
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
    _gemma4_unified(config, **heads, **experts)


def _gemma4_unified(config: Any, **more: Any) -> None:
    """Full layers have longer heads."""
    text = config.text_config
    names = ("num_hidden_layers", "layer_types", "sliding_window", "pad_token_id", *SIZES)
    sizes = {name: value for name in names if (value := read(text, name)) is not None}
    config.text_config = type(text)(**{**sizes, "head_dim": 8}, global_head_dim=16, **more)


TWEAKS: dict[str, Callable[[Any], None]] = {
    "aya_vision": _aya_vision,
    "chameleon": _chameleon,
    "cohere_compass": _cohere_compass,
    "deepseek_ocr2": _deepseek_ocr2,
    "emu3": _emu3,
    "ernie4_5_vl_moe": _ernie4_5_vl_moe,
    "fast_vlm": _clip_tower,
    "glm4v_moe": _glm4v_moe,
    "hunyuan_vl": _hunyuan_vl,
    "idefics2": _idefics2,
    "kimi_k25": _kimi_k25,
    "kosmos-2.5": _kosmos2_5,
    "lfm2_vl": _lfm2_vl,
    "lfm3_vl": _lfm3_vl,
    "llama4": _llama4,
    "minicpm_ocr": _qwen3_5,
    "minicpmv4_6": _qwen3_5,
    "minicpmv4_7": _qwen3_5,
    "muse_glimmer": _muse,
    "muse_spark": _muse,
    "qwen3_5": _qwen3_5,
    "qwen3_5_moe": _qwen3_5,
    "gemma4": _gemma4,
    "gemma4_unified": _gemma4_unified,
    "granite4_vision": _granite4_vision,
    "nemotron_h_omni": _nemotron_h_omni,
    "perception_lm": _clip_tower,
    "step3p7": _step3p7,
    "unlimited_ocr": _unlimited_ocr,
}
