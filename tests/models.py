"""Tiny random models of real Transformers classes, and prompts for them. Nothing here knows of routing.

Weights are drawn here rather than by Transformers, so that they are the same under every release, and large enough
that attention is far from uniform.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)

CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""Name of the cache argument and output: ``past_key_values`` until Transformers 5.23."""

TRANSFORMERS = tuple(map(int, transformers.__version__.split(".")[:2]))
"""The release, (major, minor), for what the older ones of those supported cannot do."""

PAD, PICTURE, VIDEO, START, VOCABULARY = 0, 120, 121, 122, 128
LAYERS = 8
Grid = tuple[int, int]


@dataclass(frozen=True)
class Sample:
    """An unpadded prompt, or a later part of one. ``visual``: positions of the placeholders in ``ids``."""

    ids: tuple[int, ...]
    visual: tuple[int, ...] = ()
    pixels: tuple[Tensor, ...] = field(default=(), repr=False)
    grids: tuple[tuple[int, int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    def __add__(self, other: Sample) -> Sample:
        moved = tuple(len(self) + i for i in other.visual)
        return Sample(self.ids + other.ids, self.visual + moved, self.pixels + other.pixels, self.grids + other.grids)

    @property
    def texts(self) -> int:
        """Number of text tokens M."""
        return len(self.ids) - len(self.visual)


def text(*tokens: int) -> Sample:
    return Sample(tuple(tokens))


@dataclass(frozen=True, eq=False)
class Tiny:
    """A model and what is needed to write prompts for it. ``grid``: its usual picture, (rows, columns) of tokens."""

    model: Any = field(repr=False)
    grid: Grid = (0, 0)

    @property
    def is_qwen(self) -> bool:
        return isinstance(self.model, Qwen2_5_VLForConditionalGeneration)

    @property
    def num_layers(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    def prompt(self, seed: int, *parts: int | Grid) -> Sample:
        """Random text of so many tokens, and pictures of so many (rows, columns) of tokens, in this order."""
        generator = torch.Generator().manual_seed(seed)
        sample = Sample(())
        for part in parts:
            if isinstance(part, int):
                sample += text(*torch.randint(1, PICTURE, (part,), generator=generator).tolist())
            else:
                sample += self._picture(part, generator)
        return sample

    def _picture(self, grid: Grid, generator: torch.Generator) -> Sample:
        ids = (PICTURE,) * (grid[0] * grid[1])
        visual = tuple(range(len(ids)))
        vision = self.model.config.vision_config
        if not self.is_qwen:
            assert grid == self.grid, "LLaVA scales every picture to one size"
            return Sample(ids, visual, (torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator),))
        rows, columns = (side * vision.spatial_merge_size for side in grid)
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        return Sample(ids, visual, (torch.randn(rows * columns, width, generator=generator),), ((1, rows, columns),))

    # --- what a model is called with ------------------------------------------------------------------------------

    def inputs(self, samples: Sequence[Sample], side: str = "left", *, positions: bool = False) -> dict[str, Tensor]:
        """Keyword arguments for a batch, padded on ``side``; with explicit position ids if asked for."""
        length = max(map(len, samples))
        rows = [_pad(torch.tensor(s.ids), length, side) for s in samples]
        valid = [_pad(torch.ones(len(s), dtype=torch.long), length, side) for s in samples]
        given = {"input_ids": torch.stack(rows), "attention_mask": torch.stack(valid)}
        pixels = [p for s in samples for p in s.pixels]
        if pixels:
            given["pixel_values"] = torch.cat(pixels)
        if self.is_qwen:
            kinds = [[int(i in s.visual) for i in range(len(s))] for s in samples]
            given["mm_token_type_ids"] = torch.stack([_pad(torch.tensor(k), length, side) for k in kinds])
            if pixels:
                given["image_grid_thw"] = torch.tensor([g for s in samples for g in s.grids])
        if positions:
            given["position_ids"] = torch.stack([_pad(self.positions(s), length, side) for s in samples], dim=-2)
        return given

    def positions(self, sample: Sample) -> Tensor:
        """Position ids (L,), or (3, L) with M-RoPE."""
        if not self.is_qwen:
            return torch.arange(len(sample))
        given = self.inputs([sample])
        kept = {k: given[k] for k in ("mm_token_type_ids", "image_grid_thw", "attention_mask") if k in given}
        positions: Tensor = self.model.model.get_rope_index(given["input_ids"], **kept)[0]
        return positions[:, 0]

    def embeds(self, sample: Sample) -> Tensor:
        """What the decoder starts from, (L, C): embedded text and projected pictures."""
        ids = torch.tensor(sample.ids)
        states: Tensor = self.model.get_input_embeddings()(ids)
        if sample.pixels:
            given = self.inputs([sample])
            grids = (given["image_grid_thw"],) if self.is_qwen else ()
            features = self.model.model.get_image_features(given["pixel_values"], *grids, return_dict=True)
            states = states.clone()
            states[list(sample.visual)] = torch.cat(tuple(features.pooler_output))
        return states

    def follow(self, before: Sequence[Sample], new: Sequence[Sample], side: str = "left") -> dict[str, Tensor]:
        """Keyword arguments for ``new`` (of one length) after the batch ``before`` has gone into a cache."""
        assert len({len(s) for s in new}) == 1, "new tokens follow one another without padding"
        given = self.inputs(new)
        past = self.inputs(before, side)["attention_mask"]
        given["attention_mask"] = torch.cat([past, given["attention_mask"]], dim=1)
        ids = [self.positions(b + n)[..., len(b) :] for b, n in zip(before, new, strict=True)]
        given["position_ids"] = torch.stack(ids, dim=-2)
        return given


def _pad(row: Tensor, length: int, side: str) -> Tensor:
    missing = length - row.shape[-1]
    return nn.functional.pad(row, (missing, 0) if side == "left" else (0, missing), value=PAD)


# --- the models ---------------------------------------------------------------------------------------------------


def llava(
    *,
    kv_heads: int = 2,
    layers: int = LAYERS,
    side: int = 4,
    tower_layers: int = 2,
    attention: str = "sdpa",
    seed: int = 0,
) -> Tiny:
    """LLaVA on Llama; ``side``² visual tokens per picture."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=512,
            **_special_tokens(),
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=tower_layers,
            num_attention_heads=2,
            image_size=8 * side,
            patch_size=8,
            projection_dim=32,
        ),
        image_token_index=PICTURE,
        image_seq_length=side**2,
    )
    return Tiny(_filled(LlavaForConditionalGeneration, config, attention, seed), (side, side))


def qwen(*, layers: int = LAYERS, tower_layers: int = 2, attention: str = "sdpa", seed: int = 0) -> Tiny:
    """Qwen2.5-VL: M-RoPE, biases, two query heads per key/value head, pictures of any size; every other layer of its
    tower attends to all patches.
    """
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            **_special_tokens(),
        },
        vision_config={
            "depth": tower_layers,
            "fullatt_block_indexes": list(range(1, tower_layers, 2)),
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,
        },
        image_token_id=PICTURE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
    )
    return Tiny(_filled(Qwen2_5_VLForConditionalGeneration, config, attention, seed), (4, 4))


def _special_tokens() -> dict[str, Any]:
    return {"pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False}


BUILDERS: dict[str, Callable[..., Tiny]] = {
    "llava-mha": functools.partial(llava, kv_heads=4),
    "llava-gqa": llava,
    "qwen": qwen,
}
NAMES = tuple(BUILDERS)


@functools.cache
def tiny(name: str, attention: str = "sdpa") -> Tiny:
    """A shared model: whoever changes it restores it."""
    return called_before(BUILDERS[name](attention=attention))


def called_before(tiny: Tiny) -> Tiny:
    """``tiny``, with the hooks that Transformers adds in a first call."""
    tiny.model(**tiny.inputs([tiny.prompt(0, 2, tiny.grid, 1)]))
    return tiny


def _filled(kind: Any, config: Any, attention: str, seed: int) -> Any:
    config._attn_implementation = attention
    model = kind(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:  # biases, norms
            is_scale = name.endswith("weight") and ("norm" in name or "ln_" in name)
            values = 0.2 * values + float(is_scale)
        elif "embed" not in name:
            values *= _gain(name) / parameter[0].numel() ** 0.5
        parameter.copy_(values)
    model.lm_head.weight[PICTURE : VIDEO + 1] = 0  # no placeholder is ever generated
    model.generation_config.update(pad_token_id=PAD, eos_token_id=None, bos_token_id=None)
    return model


def _gain(name: str) -> float:
    """Queries and keys of size 1.5 give attention logits of about 2; logits of the head are of size 2."""
    if "q_proj" in name or "k_proj" in name:
        return 1.5
    return 2.0 if "lm_head" in name else 1.0
