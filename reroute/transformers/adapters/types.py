"""What is known of Transformers' image-text-to-text types: which are routed, and which cannot be, and why.

Facts about types that looking at a model does not show, or shows too late. ``docs/reference/models.md`` has all types.
"""

from __future__ import annotations

from typing import Final

__all__ = ["REFUSED", "ROUTED"]

ROUTED: Final[tuple[str, ...]] = (
    "apertus1p5",
    "aria",
    "aya_vision",
    "chameleon",
    "cohere2_vision",
    "cohere_compass",
    "cosmos3_edge",
    "cosmos3_omni",
    "deepseek_ocr2",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "emu3",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "fast_vlm",
    "fuyu",
    "gemma3",
    "gemma4",
    "gemma4_unified",
    "glm46v",
    "glm4v",
    "glm4v_moe",
    "glm_ocr",
    "glmga",
    "got_ocr2",
    "granite4_vision",
    "granite_docling",
    "hunyuan_vl",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "kimi_k25",
    "kosmos-2.5",
    "lfm2_vl",
    "lfm3_vl",
    "lighton_ocr",
    "llama4",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "minicpm_ocr",
    "minicpmv4_6",
    "minicpmv4_7",
    "mistral3",
    "molmo2",
    "muse_glimmer",
    "muse_spark",
    "nemotron_h_omni",
    "ovis2",
    "paddleocr_vl",
    "paligemma",
    "perception_lm",
    "pp_chart2table",
    "qianfan_ocr",
    "qwen2_5_omni_thinker",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_omni_moe_thinker",
    "qwen3_vl",
    "qwen3_vl_moe",
    "shieldgemma2",
    "smolvlm",
    "step3p7",
    "unlimited_ocr",
    "video_llama_3",
    "video_llava",
    "vipllava",
)
"""``config.model_type`` of those that are routed; so are others of which all that must be known can be found out."""

_ENCODER_DECODER = "its decoder reads the picture in an encoder, by cross-attention"
_CROSS = "its decoder reads the picture by cross-attention; no token of the prompt stands for it"
_FEW = "a picture is 32 to 64 tokens of a query transformer: there is nothing to save"
_NONE = "its prompts have no visual tokens"
_SPARSE = "its attention picks keys by an index of their own, which routing would have to follow"
_STREAMS = "it runs several streams of hidden states for each token"

REFUSED: Final[dict[str, str]] = {
    "blip": _CROSS,
    "blip-2": _FEW,
    "diffusion_gemma": "it fills a canvas by diffusion: there is no causal prefill",
    "dots3_note": _SPARSE,
    "evolla": "it reads proteins: " + _NONE,
    "florence2": _ENCODER_DECODER,
    "gemma3n": _STREAMS + ", and layers share keys and values across stages",
    "git": "features of the picture come before the prompt, and no id stands for them",
    "glm5_next": _STREAMS + ", and " + _SPARSE,
    "hy_v4_vl": _STREAMS + ", and " + _SPARSE,
    "idefics": _CROSS,
    "inkling2": "its attention counts the rows that are present, for its bias and its scale",
    "inkling2_loop": "its attention counts the rows that are present, for its bias and its scale",
    "inkling_mm_model": "its attention counts the rows that are present, for its bias and its scale",
    "instructblip": _FEW,
    "instructblipvideo": _FEW,
    "kosmos-2": _FEW,
    "minimax_m3_vl": _SPARSE,
    "mistral4": _NONE + "; with pictures it comes as mistral3",
    "mistral_large4": _SPARSE + ", and layers share keys and values",
    "mllama": _CROSS,
    "pi0": "it makes actions, not text: there is no generate()",
    "pix2struct": _ENCODER_DECODER,
    "pp_formulanet": _ENCODER_DECODER,
    "qwen4_exp": _STREAMS + ", and " + _SPARSE,
    "t5gemma2": _ENCODER_DECODER,
    "udop": _ENCODER_DECODER,
    "vision-encoder-decoder": _ENCODER_DECODER,
}
"""Those that cannot be right, with the reason."""
