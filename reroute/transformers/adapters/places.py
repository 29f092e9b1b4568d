"""Where the parts of a vision-language model are that routing enters: found by name, and never guessed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ...errors import UnsupportedModelError

__all__ = [
    "PER_TOKEN",
    "base_of",
    "child",
    "decoder_path",
    "feature_levels",
    "final_norm",
    "holds",
    "is_whole",
    "parameters",
    "position_axes",
    "stops_early",
    "visual_ids",
]

DECODERS = ("language_model", "text_model")
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "layer_norm", "norm_f")
ARGUMENTS = ("input_ids", "attention_mask", "position_ids", "cache", "past_key_values", "inputs_embeds", "use_cache")
"""What every decoder can be called with."""


def child(module: Any, *names: str) -> Any:
    """The first child of ``module`` of these names.

    Raises:
        UnsupportedModelError: it has none.
    """
    found = (one for name in names if (one := getattr(module, name, None)) is not None)
    first = next(found, None)
    if first is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has no {' or '.join(map(repr, names))}. Pass the whole model "
            "(…ForConditionalGeneration), not one of its parts."
        )
    return first


def base_of(model: Any) -> Any:
    """What a whole ``model`` calls to get hidden states: its child ``model``, or itself if it calls the decoder.

    Raises:
        UnsupportedModelError: it has neither, as parts of models.
    """
    return model if _has_headed_decoder(model) or _places_pictures(model) else child(model, "model")


def decoder_path(base: Any) -> tuple[str, ...]:
    """Names of the children that lead from the base model to its decoder; none if it is that itself.

    Raises:
        UnsupportedModelError: there is no decoder of a known name.
    """
    if _places_pictures(base):
        return ("model",)
    child(base, *DECODERS, "layers")
    names = [name for name in DECODERS if getattr(base, name, None) is not None][:1]
    return (*names, "model") if _has_headed_decoder(base) else tuple(names)


def is_whole(model: Any) -> bool:
    """Whether ``model`` seems to be one with a head and a decoder."""
    base = getattr(model, "model", None)
    has_decoder = any(hasattr(base, name) for name in (*DECODERS, "layers"))
    return _has_headed_decoder(model) or (has_decoder and hasattr(model, "lm_head"))


def _has_headed_decoder(module: Any) -> bool:
    """Whether the child of ``module`` that is called as its decoder is a causal language model, with its own head."""
    text = next((one for name in DECODERS if (one := getattr(module, name, None)) is not None), None)
    return hasattr(text, "lm_head") and hasattr(text, "model")


def _places_pictures(model: Any) -> bool:
    """Whether the child ``model`` of ``model`` is the decoder alone, which is shown neither ids nor pictures."""
    text = getattr(model, "model", None)
    return hasattr(text, "layers") and "pixel_values" in set(parameters(model)).difference(parameters(text))


def final_norm(text: Any) -> Any:
    """The norm behind the last layer of the decoder. Raises what ``child`` does."""
    return child(text, *FINAL_NORMS)


def position_axes(base: Any, text: Any) -> int:
    """How many position ids a token has: several of M-RoPE, else one."""
    sections = getattr(getattr(text, "rotary_emb", None), "mrope_section", None)
    if isinstance(sections, Mapping):  # of each kind of layers
        sections = next(iter(sections.values()), None)
    return max(len(sections or ()), 3 if hasattr(base, "compute_3d_position_ids") else 1)


def stops_early(text: Any) -> bool:
    """Whether the decoder runs no more layers than ``num_hidden_layers`` says: its forward looks at the number."""
    return "num_hidden_layers" in inspect.unwrap(type(text).forward).__code__.co_names


LEVELS: Final[dict[str, Callable[[Any], Sequence[int] | Mapping[int, int]]]] = {
    "deepstack_visual_embeds": lambda config: range(len(config.vision_config.deepstack_visual_indexes)),
    "deepstack_features": lambda config: {layer: layer for layer in _target_layers(config)},
}
"""By which argument a decoder gets features that it adds to visual tokens between layers: a sequence, of which each is
added behind the next layer, or a mapping by the layer before which it is; by the configuration of the whole model."""


def feature_levels(config: Any, text: Any, merged: frozenset[str]) -> int:
    """The first layer at which all features of pictures are in the hidden states; 0 if none come between layers.

    ``merged``: arguments that the decoder uses before its first layer.

    Raises:
        UnsupportedModelError: the decoder takes something else, which may have an entry for each token.
    """
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = list(inspect.signature(type(text).forward).parameters.values())[1:]
    others = {one.name for one in parameters if one.kind not in variadic}.difference(ARGUMENTS, merged)
    levels = max((_first_without(LEVELS[name](config)) for name in others & LEVELS.keys()), default=0)
    unknown = {name for name in others - LEVELS.keys() if not name.startswith(("output_", "return_"))}
    unused = (name for name, size in UNUSED.items() if getattr(config.get_text_config(), size, None) == 0)
    unknown = unknown.difference(unused)
    unknown = unknown.difference(MARKS, PER_TOKEN)
    if unknown:
        raise UnsupportedModelError(
            f"The decoder {type(text).__name__} also takes {', '.join(sorted(unknown))}, and it is not known "
            "what it does with it between its layers. Disable routing for this model."
        )
    return levels


def _first_without(levels: Sequence[int] | Mapping[int, int]) -> int:
    return max(levels, default=0) if isinstance(levels, Mapping) else len(levels)


UNUSED: Final = {"logits_to_keep": "num_kv_shared_layers", "per_layer_inputs": "hidden_size_per_layer_input"}
"""Arguments of Gemma's that a decoder looks at only if this number is not 0: layers that share keys, and so begin to
drop rows themselves; and inputs of each layer for each token."""

PER_TOKEN: Final = ("moe_mm_token_type_ids",)
"""Arguments with an entry for each token, (B, L), that layers use row by row: which experts a token may be sent to."""

MARKS: Final = frozenset({"visual_pos_masks", "vision_mask", "cache_position"})
"""Arguments that go with those of ``LEVELS``, or that no layer uses."""


def _target_layers(config: Any) -> list[int]:
    """Of Granite Vision: features are added before these layers."""
    mapped = (pair[1] for pair in getattr(config, "deepstack_layer_map", None) or ())
    return [*mapped, *(getattr(config, "spatial_target_layers", None) or ())]


def visual_ids(config: Any) -> tuple[int, ...]:
    """Ids of the placeholders that stand for visual tokens, by the configuration of a whole model."""
    names = ("image_token_id", "video_token_id")
    return tuple(dict.fromkeys(i for name in names if (i := getattr(config, name, None)) is not None))


def parameters(module: Any) -> tuple[str, ...]:
    """Names of what a module can be called with, in order."""
    module = getattr(module, "_orig_mod", module)  # what torch.compile returns takes anything
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def holds(module: Any, part: Any) -> bool:
    """Whether ``module`` is ``part``, or was put around it."""
    return module is part or any(inner is part for inner in module.modules())
