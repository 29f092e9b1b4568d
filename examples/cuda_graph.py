"""Capture a routed prefill in a CUDA graph, and replay it for another picture.

    python examples/cuda_graph.py photo.jpg "Where is the cup?"
    python examples/cuda_graph.py --tiny

Needs a CUDA GPU. ``--tiny`` takes the small model that ships with the package and one of its held-out questions.
docs/guides/cuda-graphs.md says what a capture may not do, and why each step is as it is.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import AutoModelForImageTextToText, AutoProcessor

import reroute
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.examples import examples


def decoder_inputs(model: Any, inputs: Any) -> dict[str, torch.Tensor]:
    """Arguments of a prefill that begins with the decoder: ``inputs_embeds`` (B, L, C), and position ids if it has any.

    Merging pictures into text waits for the device, which a capture may not do. One plain prefill does it here.
    """
    found: dict[str, torch.Tensor] = {}

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        found.update({k: kwargs[k] for k in ("inputs_embeds", "position_ids") if kwargs.get(k) is not None})

    with torch.no_grad(), model.model.language_model.register_forward_pre_hook(note, with_kwargs=True):
        model(**inputs, use_cache=False, logits_to_keep=1)
    return found


def captured(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``run`` as a graph, and its output, which each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles, leases the pool rows, uploads the index tensors
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = run()
    return graph, output


def milliseconds(run: Callable[[], Any], rounds: int = 20) -> float:
    """Median time of ``run``, host included."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return median(times)


def main(argv: Sequence[str] | None = None) -> int:
    """Print how far a replay is from the eager prefill, and the time of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", nargs="?", help="a picture file")
    parser.add_argument("question", nargs="?")
    parser.add_argument("--model", default="llava-hf/llava-1.5-7b-hf", metavar="PATH_OR_ID", help="folder or Hub name")
    parser.add_argument("--tiny", action="store_true", help="the model that ships with the package")
    parser.add_argument("--keep", type=float, default=1 / 3, help="budget avg_T / N (default: 1/3)")
    options = parser.parse_args(argv)
    if options.question is None and not options.tiny:
        parser.error("give a picture and a question, or --tiny")
    if not torch.cuda.is_available():
        print("cuda_graph.py needs a CUDA GPU, and PyTorch finds none. `reroute doctor` says more.", file=sys.stderr)
        return 1
    if options.question is not None:
        image, question = Image.open(options.image).convert("RGB"), options.question
    else:
        example = examples("validation", {"hopcls": 1})[0]
        image, question = example.image, example.question

    name = str(tinyvlm.CHECKPOINTS["labels"]) if options.tiny else options.model
    model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
    model = model.to("cuda")
    processor: Any = AutoProcessor.from_pretrained(name)

    def ask(picture: Image.Image) -> Any:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(model.device, model.dtype)

    inputs = ask(image)
    given, other = decoder_inputs(model, inputs), decoder_inputs(model, ask(ImageOps.mirror(image)))

    def run() -> Any:
        return model(**given, use_cache=True, logits_to_keep=1)

    with torch.no_grad():
        print(f"plain, eager   {milliseconds(run):8.2f} ms")
        with reroute.enable(model, keep=options.keep) as handle:
            plan = handle.plan(inputs["input_ids"])  # the one step that waits for the device
            with handle.using(plan):  # holds one place in the pool; replay only inside
                eager = run().logits.clone()
                print(f"routed, eager  {milliseconds(run):8.2f} ms")
                graph, output = captured(run)
                print(f"routed, graph  {milliseconds(graph.replay):8.2f} ms")
                difference = (output.logits - eager).abs().max().item()
                print(f"largest difference of logits: {difference:.3g}")
                given["inputs_embeds"].copy_(other["inputs_embeds"])  # the mirrored picture: the same arrangement
                graph.replay()
                print(f"next token, mirrored picture: {processor.decode(output.logits[0, -1:].argmax(-1))!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
