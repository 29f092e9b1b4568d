"""Whether a decoder layer has what scoring calls, outside of the layer's own forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import UnsupportedModelError
from ..parallel import check_unit
from .projections import projections_of

__all__ = ["check_part", "check_parts", "check_scoring_layer"]

ADAPTERS, ACTIVATION = "adapter_names", "alora_offsets"
"""What PEFT hands to projections in hooks of one forward: an adapter for each row, and where activated LoRA begins."""


def check_parts(layer: Any, index: int, attention: str) -> None:
    """Check that layer ``index`` of a decoder has an attention with projections.

    Raises:
        UnsupportedModelError: one is missing.
    """
    projections = projections_of(check_part(layer, attention, index))
    for name in projections.names:
        check_part(layer, f"{attention}.{name}", index)


def check_scoring_layer(layer: Any, index: int, parts: Sequence[str]) -> None:
    """Check at a call whether layer ``index`` of a decoder can be asked to score, which calls its ``parts``.

    Raises:
        UnsupportedModelError: a part is missing, or is not what it seems while its layer does not run.
    """
    for path in parts:
        part = check_part(layer, path, index)
        _check_weights(layer, part, path, index)
        check_unit(f"{path!r} of decoder layer {index}", part, getattr(layer, path.partition(".")[0]))
        if _is_handed(part, ADAPTERS):
            raise UnsupportedModelError(
                f"PEFT chooses an adapter for each row of the batch ({ADAPTERS}) at {path!r}, which routing calls "
                "with the rows of all prompts in one. Call the model once for each adapter, or disable routing."
            )
    blocks = (part for block in layer._modules.values() if block for part in block._modules.values() if part)
    if any(_is_handed(part, ACTIVATION) for part in blocks):
        raise UnsupportedModelError(
            f"Activated LoRA counts its tokens from the end of each row ({ACTIVATION}), and routing leaves tokens out. "
            "Use another adapter, or disable routing."
        )


def check_part(layer: Any, path: str, index: int) -> Any:
    """The part at ``path`` of layer ``index``. UnsupportedModelError if it is missing."""
    part = layer
    for name in path.split("."):
        part = getattr(part, name, None)
        if part is None:
            raise UnsupportedModelError(
                f"Decoder layer {index} ({type(layer).__name__}) has no {path!r}, which ranks the visual tokens: it is "
                "wrapped, its projections are fused, or it is not a layer of attention. Enable routing on a model "
                "without that."
            )
    return part


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
