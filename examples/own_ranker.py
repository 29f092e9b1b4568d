"""Rank visual tokens by a score of your own, and compare what is kept with the ranking by attention.

    python examples/own_ranker.py photo.jpg "Where is the cup?"
    python examples/own_ranker.py --tiny

``--tiny`` takes the small model that ships with the package and one of its held-out questions: no download, no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import AutoModelForImageTextToText, AutoProcessor

import reroute
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.examples import examples
from reroute.methods import FastV
from reroute.rankers import RankInputs, ScoreRanker


@dataclass(frozen=True)
class Similarity(ScoreRanker):
    """Cosine similarity of each candidate's hidden state to that of the last prompt token."""

    def scores(self, inputs: RankInputs) -> list[torch.Tensor]:
        """Scores (N_b,) of the candidates (N_b, C) of each sample; nothing here waits for the device."""
        queries = normalize(inputs.query.float(), dim=-1)
        return [normalize(rows.float(), dim=-1) @ query for rows, query in zip(inputs.hidden, queries, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    """Print both answers, and for each decision how many tokens both rankers keep."""
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

    print(f"{'question':11} {question}")
    traces = []
    for name, method in (("attention", FastV()), ("similarity", FastV(ranker=Similarity()))):
        with reroute.enable(model, method=method, keep=options.keep, trace=True) as handle:
            output = model.generate(**inputs, do_sample=False, max_new_tokens=32)
        text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"{name:11} {text.strip()}")
        traces.append([(stage.layer, set(stage.kept[0].tolist())) for stage in handle.trace or ()])
    print()
    for (layer, one), (_, other) in zip(*traces, strict=True):
        print(f"before layer {layer:2}: each keeps {len(one)} visual tokens, {len(one & other)} of them the same")
    return 0


if __name__ == "__main__":
    sys.exit(main())
