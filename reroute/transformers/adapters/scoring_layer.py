"""Whether a decoder layer has what scoring calls, outside of the layer's own forward."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModelError

__all__ = ["check_parts", "check_scoring_layer"]

NEEDED = ("input_layernorm", "self_attn", "self_attn.q_proj", "self_attn.k_proj")
"""Modules that scoring calls."""
NUMBERS = ("head_dim", "scaling")
"""What it reads off the attention."""
ADAPTERS, ACTIVATION = "adapter_names", "alora_offsets"
"""What PEFT hands to projections in hooks of one forward: an adapter for each row, and where activated LoRA begins."""


def check_parts(layer: Any, index: int) -> list[Any]:
    """The modules that scoring calls in layer ``index`` of a decoder.

    Raises:
        UnsupportedModelError: one is missing.
    """
    parts = [_part(layer, path, index) for path in NEEDED]
    for name in NUMBERS:
        if not hasattr(parts[1], name):
            raise UnsupportedModelError(_without(f"self_attn.{name}", layer, index))
    return parts


def check_scoring_layer(layer: Any, index: int) -> None:
    """Check at a call whether layer ``index`` of a decoder can be asked to score.

    Raises:
        UnsupportedModelError: a part is missing, or is not what it seems while its layer does not run.
    """
    for path, part in zip(NEEDED, check_parts(layer, index), strict=True):
        if path != "self_attn":
            _check_weights(layer, part, path, index)
            if _is_handed(part, ADAPTERS):
                raise UnsupportedModelError(
                    f"PEFT chooses an adapter for each row of the batch ({ADAPTERS}) at {path!r}, which routing calls "
                    "with the rows of all prompts in one. Call the model once for each adapter, or disable routing."
                )
    parts = (part for block in layer._modules.values() if block for part in block._modules.values() if part)
    if any(_is_handed(part, ACTIVATION) for part in parts):
        raise UnsupportedModelError(
            f"Activated LoRA counts its tokens from the end of each row ({ACTIVATION}), and routing leaves tokens out. "
            "Use another adapter, or disable routing."
        )


def _part(layer: Any, path: str, index: int) -> Any:
    part = layer
    for name in path.split("."):
        part = getattr(part, name, None)
        if part is None:
            raise UnsupportedModelError(_without(path, layer, index))
    return part


def _without(path: str, layer: Any, index: int) -> str:
    return (
        f"Decoder layer {index} ({type(layer).__name__}) has no {path!r}, which ranks the visual tokens: it is "
        "wrapped, or its projections are fused. Enable routing on the model without that."
    )


def _check_weights(layer: Any, part: Any, path: str, index: int) -> None:
    """Refuse weights that accelerate loads when the *layer's* forward begins, and not when they are used."""
    if "_hf_hook" not in vars(layer) or any("_hf_hook" in vars(inner) for inner in part.modules()):
        return
    if any(weight.is_meta for weight in part.parameters()):
        raise UnsupportedModelError(
            f"The weights of {path!r} of decoder layer {index} are loaded by the layer as a whole when it runs "
            "(accelerate's preload_module_classes), and routing ranks before that. Offload without it."
        )


def _is_handed(part: Any, name: str) -> bool:
    hooks = part._forward_pre_hooks
    return bool(hooks) and any(name in getattr(hook, "keywords", ()) for hook in hooks.values())
