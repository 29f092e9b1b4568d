"""Accuracy and cost over budgets, rerouted and removed, on questions with one-word answers.

    python examples/sweep.py --data questions.jsonl --out results.jsonl
    python examples/sweep.py --tiny

Each line of ``questions.jsonl`` is ``{"image": "photo.jpg", "question": "...", "answer": "..."}``; picture paths are
relative to that file. ``--tiny`` takes the small model that ships with the package and its held-out questions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import reroute
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.examples import examples

Question = tuple[Image.Image, str, str]
"""Picture, question, answer."""


def read(file: Path) -> list[Question]:
    """The questions in a file of JSON lines."""
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [(Image.open(file.parent / x["image"]).convert("RGB"), x["question"], x["answer"]) for x in lines]


def is_right(model: Any, processor: Any, item: Question) -> bool:
    """Whether the greedy answer begins with the expected word, whatever its case."""
    image, question, expected = item
    content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device, model.dtype)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=8)
    words = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).lower().split()
    return bool(words) and words[0].strip(".,!") == expected.lower()


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line per setting; with ``--out`` also write one, with the settings in it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="JSONL", help="the questions")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", metavar="PATH_OR_ID", help="folder or Hub name")
    parser.add_argument("--tiny", action="store_true", help="the model that ships with the package")
    parser.add_argument("--questions", type=int, default=20, metavar="N", help="of each of three kinds, with --tiny")
    parser.add_argument("--method", default="diverse", help="default: %(default)s")
    parser.add_argument("--keep", type=float, nargs="+", default=[1 / 3, 2 / 9, 1 / 9], help="budgets avg_T / N")
    parser.add_argument("--out", type=Path, metavar="JSONL", help="where the results go")
    options = parser.parse_args(argv)
    if options.data is not None:
        questions = read(options.data)
    elif options.tiny:
        kinds = dict.fromkeys(("col", "hopcls", "riddlecol"), options.questions)
        questions = [(e.image, e.question, e.answer) for e in examples("validation", kinds)]
    else:
        parser.error("give --data, or --tiny")

    name = str(tinyvlm.CHECKPOINTS["labels"]) if options.tiny else options.model
    model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    processor: Any = AutoProcessor.from_pretrained(name)

    configs = [reroute.RoutingConfig(method=options.method, keep=1.0)]  # the plain model, counted the same way
    for keep in options.keep:
        for action in ("remove", "route"):
            configs.append(reroute.RoutingConfig(method=options.method, action=action, keep=keep))
    print(f"{len(questions)} questions\n{'':20}  correct   avg_T   FLOPs  KV cache")
    lines = []
    for config in configs:
        with reroute.enable(model, config=config) as handle:
            right = sum(is_right(model, processor, item) for item in questions)
        spent = handle.totals()
        flops, kv_cache = spent.prefill_flops / spent.prefill_flops_dense, spent.kv_bytes / spent.kv_bytes_dense
        setting = "dense" if config.keep == 1 else f"{options.method} {config.action} {config.keep:.3f}"
        accuracy = right / len(questions)
        print(f"{setting:20} {accuracy:8.1%} {spent.avg_tokens:7.1f} {flops:7.1%} {kv_cache:9.1%}", flush=True)
        found = {"accuracy": accuracy, "avg_tokens": spent.avg_tokens, "flops": flops, "kv_cache": kv_cache}
        lines.append(json.dumps({"config": json.loads(config.to_json()), **found}))
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
