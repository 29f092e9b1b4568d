"""Answer one question about one picture, by the plain model and routed.

    python examples/quickstart.py photo.jpg "Where is the cup?"
    python examples/quickstart.py --tiny

``--tiny`` takes the small model that ships with the package and one of its held-out questions: no download, no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import reroute
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.examples import examples


def main(argv: Sequence[str] | None = None) -> int:
    """Print both answers, and what the routed prefill cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="a picture file")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", metavar="PATH_OR_ID", help="folder or Hub name")
    parser.add_argument("--tiny", action="store_true", help="the model that ships with the package")
    parser.add_argument("--keep", type=float, default=1 / 3, help="budget avg_T / N (default: 1/3)")
    options = parser.parse_args(argv)
    if options.question is not None:
        image, question = Image.open(options.image).convert("RGB"), options.question
    elif options.tiny:
        example = examples("validation", {"hopcls": 1})[0]
        image, question = example.image, example.question
    else:
        parser.error("give a picture and a question, or --tiny")

    name = str(tinyvlm.CHECKPOINTS["labels"]) if options.tiny else options.model
    model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor: Any = AutoProcessor.from_pretrained(name)
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)

    def answer() -> str:
        output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()

    print(f"question  {question}")
    print(f"plain     {answer()}")
    handle = reroute.enable(model, keep=options.keep)
    print(f"routed    {answer()}")  # nothing else changes
    print(f"\n{handle.stats()}")
    handle.disable()  # the model is exactly what it was
    return 0


if __name__ == "__main__":
    sys.exit(main())
