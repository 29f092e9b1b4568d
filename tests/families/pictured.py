"""Tiny models of the main families with real vision towers, and prompts whose pictures are merged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tiny_types import LAYERS, PICTURE, SECTION, VIDEO, VOCABULARY, WINDOW, TinyType, axes_of, fill
from torch import Tensor

__all__ = ["PICTURED", "ROPE", "TEXT", "VISION", "Pictured", "Prompt", "made", "patches", "random"]

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": SECTION}
PINPOINTS = [[32, 32], [32, 64], [64, 32]]


@dataclass(frozen=True)
class Prompt:
    """``ids`` of one sample, and what its pictures come in; a batch has those of all samples one after the other."""

    ids: list[int]
    pictures: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True, eq=False)
class Pictured:
    """A model. ``pictures(seed)`` are random ones of some size, as the model takes them; ``tokens`` of them.

    ``pads``: whether its own generation places the tokens of padded samples as it does without padding.
    """

    tiny: TinyType
    pictures: Callable[[int], dict[str, Tensor]] = field(repr=False)
    tokens: Callable[[dict[str, Tensor]], int] | None = None
    pads: bool = True

    def prompt(self, seed: int, before: int, after: int) -> Prompt:
        """Text, a picture, text."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 140, (before + after,), generator=generator).tolist()
        given = self.pictures(seed)
        count = (self.tokens or self._features)(given)
        return Prompt([*ids[:before], *[PICTURE] * count, *ids[before:]], given)

    @torch.no_grad()
    def _features(self, given: dict[str, Tensor]) -> int:
        features = self.tiny.model.model.get_image_features(**given, return_dict=True).pooler_output
        return sum(feature.shape[:-1].numel() for feature in features)

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Left-padded."""
        length = max(len(prompt.ids) for prompt in prompts)
        padded = [[0] * (length - len(prompt.ids)) + prompt.ids for prompt in prompts]
        given = {"input_ids": torch.tensor(padded)}
        given["attention_mask"] = (given["input_ids"] != 0).long()
        for name in prompts[0].pictures:
            given[name] = torch.cat([prompt.pictures[name] for prompt in prompts])
        if self.tiny.marks is not None:
            given[self.tiny.marks] = (given["input_ids"] == PICTURE).long()
        return given


def made(kind: str, config: Any) -> Any:
    """A model of this class."""
    config._attn_implementation = "eager"
    model: Any = getattr(transformers, kind)(config).eval().requires_grad_(False)
    fill(model)
    head = next(module for name, module in model.named_modules() if name.endswith("lm_head"))
    head.weight[PICTURE : VIDEO + 1] = 0  # no placeholder is generated
    model.generation_config.update(pad_token_id=0, eos_token_id=None, bos_token_id=None)
    return model


def _made(kind: str, config: Any, pictures: Callable[[int], dict[str, Tensor]], marks: str | None = None) -> Pictured:
    model = made(kind, config)
    base = model.model
    text = base.language_model if hasattr(base, "language_model") else base.text_model
    axes = axes_of(text)
    return Pictured(TinyType(model, text, axes, marks if axes == 1 else "mm_token_type_ids"), pictures)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _side(seed: int) -> int:
    """Two of three pictures differ in size."""
    return 4 + 2 * (seed % 2)


def patches(seed: int) -> dict[str, Tensor]:
    """As Qwen's and GLM's processors give them: 2 x 4 x 4 pixels each, merged 2 x 2."""
    rows, columns = _side(seed), 4
    return {
        "pixel_values": random(seed, rows * columns, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, rows, columns]]),
    }


def _qwen2_vl() -> Pictured:
    sizes = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = transformers.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config=sizes,
        image_token_id=PICTURE,
        video_token_id=VIDEO,
    )
    return _made("Qwen2VLForConditionalGeneration", config, patches)


def _qwen3_vl() -> Pictured:
    """Features come behind layers 0 and 1."""
    sizes = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={
            **sizes,
            "patch_size": 4,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=PICTURE,
        video_token_id=VIDEO,
    )
    return _made("Qwen3VLForConditionalGeneration", config, patches)


def _glm4v() -> Pictured:
    sizes = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    config = transformers.Glm4vConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**sizes, "patch_size": 4, "image_size": 32},
        image_token_id=PICTURE,
        video_token_id=VIDEO,
    )
    return _made("Glm4vForConditionalGeneration", config, patches)


def _internvl() -> Pictured:
    config = transformers.InternVLConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        image_token_id=PICTURE,
        image_seq_length=4,
    )
    tiles = lambda seed: {"pixel_values": random(seed, 1 + seed % 2, 3, 32, 32)}
    return _made("InternVLForConditionalGeneration", config, tiles)


def _any_resolution(seed: int) -> dict[str, Tensor]:
    """A picture, and the two tiles of it."""
    sizes = torch.tensor([[[32, 64], [64, 32]][seed % 2]])
    return {"pixel_values": random(seed, 1, 3, 3, 32, 32), "image_sizes": sizes}


def _llava_onevision() -> Pictured:
    auto: Any = transformers  # whose annotations lack other names of the same
    config = auto.LlavaOnevisionConfig(
        text_config=transformers.Qwen2Config(**TEXT),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        image_token_id=PICTURE,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
    )
    return _made("LlavaOnevisionForConditionalGeneration", config, _any_resolution)


def _llava_next() -> Pictured:
    config = transformers.LlavaNextConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=PICTURE,
        image_grid_pinpoints=PINPOINTS,
    )
    return _made("LlavaNextForConditionalGeneration", config, _any_resolution)


def _mistral3() -> Pictured:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_config=transformers.PixtralVisionConfig(**{**VISION, "image_size": 64}),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
    )

    def picture(seed: int) -> dict[str, Tensor]:
        rows = 8 * _side(seed)
        return {"pixel_values": random(seed, 1, 3, 48, 32), "image_sizes": torch.tensor([[rows, 32]])}

    return _made("Mistral3ForConditionalGeneration", config, picture)


def _smolvlm() -> Pictured:
    auto: Any = transformers
    config = auto.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=dict(VISION),
        image_token_id=PICTURE,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return _made(
        "SmolVLMForConditionalGeneration", config, lambda seed: {"pixel_values": random(seed, 1, 2, 3, 32, 32)}
    )


def _gemma3() -> Pictured:
    """Pictures see themselves both ways, and are longer than windows."""
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    kinds[4] = "full_attention"
    sizes = {**TEXT, "sliding_window": WINDOW, "layer_types": kinds, "query_pre_attn_scalar": 8}
    config = transformers.Gemma3Config(
        text_config=sizes,
        vision_config={**VISION, "image_size": 48},
        mm_tokens_per_image=9,
        image_token_index=PICTURE,
        boi_token_index=VIDEO + 1,
        eoi_token_index=VIDEO + 2,
    )
    return _made(
        "Gemma3ForConditionalGeneration",
        config,
        lambda seed: {"pixel_values": random(seed, 1, 3, 48, 48)},
        marks="token_type_ids",
    )


def _qwen3_5() -> Pictured:
    """Recurrent layers before, between and behind decisions."""
    kinds = ["linear_attention", *["full_attention"] * 2, "linear_attention", *["full_attention"] * 2]
    states = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    sizes = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "num_heads": 2, "intermediate_size": 48}
    rope = {**ROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}
    config = transformers.Qwen3_5Config(
        text_config={
            **TEXT,
            **states,
            "linear_num_value_heads": 4,
            "layer_types": kinds,
            "rope_parameters": rope,
        },
        vision_config={**sizes, "patch_size": 4, "num_position_embeddings": 16},
        image_token_id=PICTURE,
        video_token_id=VIDEO,
    )
    return _made("Qwen3_5ForConditionalGeneration", config, patches)


def _lfm2_vl() -> Pictured:
    kinds = ["conv", "conv", "full_attention", "conv", "full_attention", "full_attention"]
    config = transformers.Lfm2VlConfig(
        text_config=transformers.Lfm2Config(**{**TEXT, "layer_types": kinds}),
        vision_config=transformers.Siglip2VisionConfig(**{**VISION, "num_patches": 16}),
        image_token_id=PICTURE,
        tie_word_embeddings=False,
    )

    def picture(seed: int) -> dict[str, Tensor]:
        rows, columns, most = _side(seed), 4, 24
        mask = torch.zeros(1, most, dtype=torch.long)
        mask[:, : rows * columns] = 1
        pixels = random(seed, 1, most, 3 * 8 * 8) * mask[..., None]
        shapes = torch.tensor([[rows, columns]])
        return {"pixel_values": pixels, "spatial_shapes": shapes, "pixel_attention_mask": mask}

    return _made("Lfm2VlForConditionalGeneration", config, picture)


PICTURED: dict[str, Callable[[], Pictured]] = {
    make.__name__.removeprefix("_"): functools.cache(make)
    for make in (
        _qwen2_vl,
        _qwen3_vl,
        _glm4v,
        _internvl,
        _llava_onevision,
        _llava_next,
        _mistral3,
        _smolvlm,
        _gemma3,
        _qwen3_5,
        _lfm2_vl,
    )
}
