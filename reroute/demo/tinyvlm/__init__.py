"""A small vision-language model that ships with the package, to see and test routing on.

It answers questions about synthetic scenes of handwritten digits: see the README.md beside this
file for what it can do and how it was trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["CHECKPOINT", "load"]

CHECKPOINT: Final = Path(__file__).with_name("checkpoint")
_FILES: Final = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def load(
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    checkpoint: Path | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model, in eval mode on the CPU, and its processor.

    `dtype` defaults to float32; `checkpoint` to the folder that ships with the package. Raises
    FileNotFoundError when the folder or a file of it is missing, ValueError when it is damaged.
    """
    folder = CHECKPOINT if checkpoint is None else checkpoint
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"tinyvlm is incomplete: {folder} lacks {', '.join(missing)}. {_remedy(folder)}")
    import torch
    import transformers

    # Transformers annotates its loaders only in part.
    loaders: Any = transformers
    try:
        model, report = loaders.LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.float32 if dtype is None else dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
        processor = loaders.AutoProcessor.from_pretrained(folder)
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(_damaged(folder, str(error))) from error
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise ValueError(_damaged(folder, "its weights do not fit its configuration"))
    return model.eval(), processor


def _damaged(folder: Path, why: str) -> str:
    return f"tinyvlm in {folder} cannot be loaded ({why}). {_remedy(folder)}"


def _remedy(folder: Path) -> str:
    return (
        "Reinstall the package, or train the model again in a clone of the repository: "
        f"python -m training.tinyvlm.train --out runs/tinyvlm --export {folder}"
    )
