"""Open a picture, load a model, put a question to it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..demo.tinyvlm import CHECKPOINTS
from ..errors import RerouteError
from .common import refusals, shorten

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature

__all__ = ["DTYPES", "Loaded", "Prompt", "check_model_name", "is_demo_model", "load_model", "open_image"]

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
"""That a model may be loaded in; ``auto`` is that of its file."""


def open_image(path: Path) -> Image.Image:
    """The picture at ``path``, upright and in RGB.

    Raises:
        RerouteError: there is none; says what is there.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise RerouteError(f"{path} is a folder, not a picture." if path.is_dir() else f"There is no picture {path}.")
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError:
        raise RerouteError(f"{path} is not a picture that can be read: give a PNG, JPEG, WebP, GIF or BMP.") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RerouteError(f"The picture {path} cannot be read ({shorten(error)}).") from None


@dataclass(frozen=True)
class Prompt:
    """A question about a picture. ``image`` is what the model sees of it, ``inputs`` a batch of one."""

    question: str
    image: Image.Image
    inputs: Mapping[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A model with its processor. ``is_tinyvlm``: it is one that ships with this package."""

    name: str
    model: Any
    processor: Any
    is_tinyvlm: bool

    def prompt(self, image: Image.Image, question: str) -> Prompt:
        """One question about one picture, on the model's device. Raises what ``inputs`` does."""
        question = _known_words(question) if self.is_tinyvlm else question
        inputs = self.inputs([image], question)
        return Prompt(question, self._seen(inputs, image), inputs.to(self.model.device, self.model.dtype))

    def inputs(self, images: Sequence[Image.Image], question: str) -> BatchFeature:
        """What the model takes for a question about pictures, in its own chat format: a batch of one on the CPU.

        Raises:
            RerouteError: the model has no chat format, or is tinyvlm and does not know a word.
        """
        if getattr(self.processor, "chat_template", None) is None:
            raise RerouteError(f"{self.name} has no chat template, so it is not made for questions. Use a chat model.")
        text = _known_words(question) if self.is_tinyvlm else question
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
        inputs: BatchFeature = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return inputs

    def _seen(self, inputs: Mapping[str, Any], image: Image.Image) -> Image.Image:
        """What the processor made of ``image``, where that can be read off its output."""
        pixels = inputs["pixel_values"]
        if pixels.ndim != 4:  # patches already: the whole picture, so the original shows the same
            return image
        import torch
        from PIL import Image

        prepare = self.processor.image_processor
        mean, std = (torch.tensor(values)[:, None, None] for values in (prepare.image_mean, prepare.image_std))
        colours = (pixels[0].float().cpu() * std + mean).clamp(0, 1) * 255
        return Image.fromarray(colours.round().byte().permute(1, 2, 0).numpy())


def _known_words(question: str) -> str:
    """The question as tinyvlm was taught to read: lower case, words apart.

    Raises:
        RerouteError: it holds words that the model never saw.
    """
    from ..demo.tinyvlm.vocabulary import TOKENS

    words = re.findall(r"[^\s?]+|\?", question.lower())
    strange = [word for word in words if word not in TOKENS]
    if strange:
        raise RerouteError(
            f"The demo model does not know {', '.join(map(repr, strange))}. It answers questions about scenes of "
            'coloured digits, such as "where is the red seven ?"; for others name another model.'
        )
    return " ".join(words)


def load_model(name: str | None, dtype: str, device: torch.device) -> Loaded:
    """The model in a folder, on the Hub, or of this package by its name there; None is the first of these.

    Raises:
        RerouteError: it cannot be found, loaded or routed; says which.
    """
    if is_demo_model(name):
        return _of_package(name or next(iter(CHECKPOINTS)), dtype, device)
    assert name is not None
    return _from_transformers(name, dtype, device)


def is_demo_model(name: str | None) -> bool:
    """Whether ``load_model`` takes one of this package."""
    return name is None or name in CHECKPOINTS


def check_model_name(name: str | None) -> None:
    """Check, before anything is loaded, that ``name`` may be that of a model.

    Raises:
        RerouteError: it is neither that of a folder with a model, nor can it be one on the Hub.
    """
    if is_demo_model(name):
        return
    assert name is not None
    folder = Path(name).expanduser()
    if folder.is_dir() and name:  # without a name it is the current one
        if not (folder / "config.json").is_file():
            raise RerouteError(f"The folder {name} holds no model: it has no config.json, as save_pretrained writes.")
    elif folder.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise RerouteError(f"{name!r} is no model folder, nor a name on the Hub such as llava-hf/llava-1.5-7b-hf.")


def _of_package(name: str, dtype: str, device: torch.device) -> Loaded:
    import torch

    from ..demo import tinyvlm

    with refusals(FileNotFoundError, ValueError):
        model, processor = tinyvlm.load(name, None if dtype == "auto" else getattr(torch, dtype))
    return Loaded("the demo model", model.to(device), processor, is_tinyvlm=True)  # type: ignore[arg-type]


def _from_transformers(name: str, dtype: str, device: torch.device) -> Loaded:
    import torch
    import transformers

    from ..transformers import check_type

    auto: Any = transformers  # its loaders are annotated only in part
    folder = Path(name).expanduser()
    source = str(folder) if folder.is_dir() else name
    try:
        config = auto.AutoConfig.from_pretrained(source)
    except Exception as error:  # the Hub's clients and damaged folders raise all kinds
        raise _unloadable(name, error) from None
    check_type(config, f"the model {name}")
    try:
        processor = auto.AutoProcessor.from_pretrained(source)
        model, report = auto.AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, output_loading_info=True)
        model = model.to(device).eval()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _unloadable(name, error) from None
    if report["missing_keys"]:
        print(f"{name} lacks {len(report['missing_keys'])} weights, which are random now.", file=sys.stderr)
    return Loaded(name, model, processor, is_tinyvlm=False)


def _unloadable(name: str, error: Exception) -> RerouteError:
    first_sentence = re.split(r"(?<=[.!?])\s", shorten(error))[0].rstrip(".")
    hint = " Without a network, name a folder that holds the model." if "huggingface.co" in first_sentence else ""
    return RerouteError(f"The model {name} cannot be loaded: {first_sentence}.{hint}")
