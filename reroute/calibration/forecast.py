"""What a calibration will run, known before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.cost import ModelShape, estimate_cost, layer_flops
from ..core.schedule import Schedule
from .prompts import Prompt, batches

__all__ = ["Forecast", "forecast"]


@dataclass(frozen=True)
class Forecast:
    """At most so many forwards of batches, tokens that enter them, and FLOPs of the decoder, which are modelled.

    ``plain``: (forwards, tokens, FLOPs) of the plain model with its answers; ``routed``: of all routed runs, as if no
    layer before a first decision were left out.
    """

    plain: tuple[int, int, float]
    routed: tuple[int, int, float]

    def __str__(self) -> str:
        """One line for each."""
        rows = (("plain model, answers included", self.plain), ("routed runs", self.routed))
        return "\n".join(
            f"{name}: at most {forwards} forwards, {tokens:,} tokens, {flops / 1e12:.3g} TFLOP (modelled)"
            for name, (forwards, tokens, flops) in rows
        )


def forecast(
    shape: ModelShape,
    parts: Sequence[Sequence[Prompt]],
    runs: Sequence[int],
    schedule: Schedule,
    max_new_tokens: int,
    max_tokens: int,
) -> Forecast:
    """What it takes to answer all prompts and to run each of ``parts`` as often as ``runs`` says, by ``schedule``."""
    dense = Schedule((0,), (1.0,))
    plain_forwards = plain_tokens = routed_forwards = routed_tokens = 0
    plain_flops = routed_flops = 0.0
    for prompts, repeats in zip(parts, runs, strict=True):
        calls = len(batches(prompts, max_tokens, max_new_tokens))
        plain_forwards += calls * (1 + max_new_tokens)  # with the one that runs prompts and answers together
        routed_forwards += repeats * calls
        for prompt in prompts:
            text, whole = len(prompt) - prompt.visual, len(prompt) + max_new_tokens - 1
            plain_tokens += len(prompt) + max_new_tokens - 1 + whole
            step = shape.num_layers * layer_flops(shape, 1, whole)
            once = estimate_cost(shape, dense, "route", prompt.visual, text).prefill_flops
            again = estimate_cost(shape, dense, "route", prompt.visual, text + max_new_tokens - 1).prefill_flops
            plain_flops += once + again + (max_new_tokens - 1) * step
            routed = estimate_cost(shape, schedule, "route", prompt.visual, text + max_new_tokens - 1).prefill_flops
            routed_tokens += repeats * whole
            routed_flops += repeats * routed
    return Forecast((plain_forwards, plain_tokens, plain_flops), (routed_forwards, routed_tokens, routed_flops))
