"""Two small vision-language models that ship with the package, to see and test routing on.

They answer questions about synthetic scenes of handwritten digits: see the README.md beside this file for what they
can do and how they were trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["CHECKPOINTS", "load"]

# By what taught the vision tower: labels of patches, or text about whole images.
CHECKPOINTS: Final = {name: Path(__file__).with_name("checkpoints") / name for name in ("labels", "text")}
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
    model: str | Path = "labels",
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model, in eval mode on the CPU, and its processor.

    Args:
        model: a name in ``CHECKPOINTS``, or the path of a checkpoint folder.
        dtype: float32 by default.
        attn_implementation: as Transformers names it.

    Raises:
        FileNotFoundError: the folder or a file of it is missing.
        ValueError: the name is unknown, or the folder is damaged.
    """
    if isinstance(model, str) and model not in CHECKPOINTS:
        raise ValueError(f"unknown model {model!r}; known models are {', '.join(CHECKPOINTS)}; a folder is a Path")
    folder = CHECKPOINTS[model] if isinstance(model, str) else model
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"tinyvlm is incomplete: {folder} lacks {', '.join(missing)}. {_remedy(folder)}")
    import torch
    import transformers

    # Transformers annotates its loaders only in part.
    loaders: Any = transformers
    try:
        loaded, report = loaders.LlavaForConditionalGeneration.from_pretrained(
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
    return loaded.eval(), processor


def _damaged(folder: Path, why: str) -> str:
    return f"tinyvlm in {folder} cannot be loaded ({why}). {_remedy(folder)}"


def _remedy(folder: Path) -> str:
    name = next((name for name, path in CHECKPOINTS.items() if path == folder), "labels")
    return (
        "Reinstall the package, or train the model again in a clone of the repository: "
        f"python -m training.tinyvlm.train --model {name} --out runs/{name} --export {folder}"
    )
