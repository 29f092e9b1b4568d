"""The plain model on the prompts: its greedy answers, and the states that routed runs start from and end at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .prompts import Prompt, batches, collate

__all__ = ["Model", "Reference", "answer", "refer", "resumed_at"]

MAX_STATE_BYTES = 4 << 30
"""Of hidden states that are held on the CPU, so that routed runs need not compute what lies before a decision."""


@dataclass(frozen=True)
class Model:
    """A model and its parts. ``head`` makes logits of the last hidden states, as in every model that is supported."""

    whole: Any
    base: Any
    text: Any
    layers: Sequence[Any]
    head: Any
    pad: int
    eos: frozenset[int]

    @classmethod
    def of(cls, model: Any, adapter: Any) -> Model:
        """The parts of ``model``, which ``adapter`` is bound to."""
        config = model.generation_config
        eos = config.eos_token_id
        ends = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        pad = config.pad_token_id
        pad = min(ends, default=0) if pad is None else pad
        return cls(model, adapter.base, adapter.text, adapter.layers, model.get_output_embeddings(), pad, ends)

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """``inputs`` where the model is, those with a fraction in its dtype."""
        device, dtype = self.whole.device, self.whole.dtype
        return {
            name: x.to(device=device, dtype=dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
            for name, x in inputs.items()
        }


@torch.no_grad()
def answer(model: Model, prompts: Sequence[Prompt], max_new_tokens: int, max_tokens: int) -> list[list[int]]:
    """The greedy answers, each with the token that ends it if one came within ``max_new_tokens``."""
    answers: dict[int, list[int]] = {}
    for indices in batches(prompts, max_tokens, max_new_tokens):
        inputs = model.placed(collate([prompts[i] for i in indices], [()] * len(indices), model.pad))
        output = model.whole.generate(
            **inputs, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, pad_token_id=model.pad
        )
        for index, new in zip(indices, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((place for place, token in enumerate(new) if token in model.eos), len(new) - 1)
            answers[index] = new[: end + 1]
    return [answers[index] for index in range(len(prompts))]


@dataclass(frozen=True)
class Reference:
    """One batch of prompts with their answers, run by the plain model. On the CPU.

    - ``indices``: which prompts.
    - ``ids``, ``mask``, ``labels`` (B, L): what a plan is made of; labels are -100 outside of the answers.
    - ``positions``: position ids as the decoder got them, or None.
    - ``states[layer]`` (B, L, C): input of a decoder layer, for layer 0 and some others.
    - ``rows`` (R,): which of the B * L tokens predict answers; ``owners`` (R,): of which sample.
    - ``final`` (R, C): their last hidden states, from which the dense distributions follow.
    """

    indices: tuple[int, ...]
    ids: Tensor
    mask: Tensor
    labels: Tensor
    positions: Tensor | None
    states: Mapping[int, Tensor]
    rows: Tensor
    owners: Tensor
    final: Tensor


@torch.no_grad()
def refer(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]], last: int, max_tokens: int
) -> list[Reference]:
    """Run the plain model once on every prompt and its answer; hold states up to the input of layer ``last``."""
    longest = max(map(len, answers))
    config = model.whole.config.get_text_config()
    tokens = sum(map(len, prompts)) + sum(map(len, answers))
    held = _spread(last, MAX_STATE_BYTES // (tokens * config.hidden_size * model.whole.dtype.itemsize))
    return [
        _refer(model, indices, [prompts[i] for i in indices], [answers[i] for i in indices], held)
        for indices in batches(prompts, max_tokens, longest)
    ]


def _spread(last: int, count: int) -> tuple[int, ...]:
    """Layer 0 and as many others up to ``last`` as make ``count``, evenly spaced."""
    count = min(last + 1, max(1, count))
    return tuple(sorted({last * i // max(1, count - 1) for i in range(count)}))


def _refer(
    model: Model,
    indices: Sequence[int],
    prompts: Sequence[Prompt],
    answers: Sequence[Sequence[int]],
    held: Sequence[int],
) -> Reference:
    # The last token of an answer predicts nothing.
    inputs = collate(prompts, [answer[:-1] for answer in answers], model.pad)
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    labels = torch.full_like(ids, -100)
    rows: list[int] = []
    owners: list[int] = []
    for row, answer in enumerate(answers):
        begin = length - len(answer)  # the last token of the prompt predicts the first of the answer
        labels[row, begin + 1 :] = ids[row, begin + 1 :]
        rows += range(row * length + begin, (row + 1) * length)
        owners += [row] * len(answer)
    with _recorded(model, held) as (states, called):
        output = model.base(**model.placed(inputs), use_cache=False, return_dict=True).last_hidden_state
    places, positions = torch.tensor(rows), called.get("position_ids")
    final = output.flatten(0, 1)[places.to(output.device)].cpu()
    positions = None if positions is None else positions.cpu()
    mask = inputs["attention_mask"]
    return Reference(tuple(indices), ids, mask, labels, positions, states, places, torch.tensor(owners), final)


@contextmanager
def _recorded(model: Model, held: Sequence[int]) -> Iterator[tuple[dict[int, Tensor], dict[str, Any]]]:
    """What the decoder is called with in ``with``: the input of the layers ``held``, and its keyword arguments."""
    states: dict[int, Tensor] = {}
    called: dict[str, Any] = {}

    def at_decoder(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        called.update(kwargs)
        states[0] = kwargs["inputs_embeds"].cpu()

    def at_layer(index: int) -> Any:
        def record(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            states[index] = (args[0] if args else kwargs["hidden_states"]).cpu()

        return record

    handles = [model.text.register_forward_pre_hook(at_decoder, with_kwargs=True)]
    handles += [model.layers[i].register_forward_pre_hook(at_layer(i), with_kwargs=True) for i in held if i]
    try:
        yield states, called
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed_at(layers: Sequence[Any], index: int, state: Tensor) -> Iterator[None]:
    """In ``with``, layers before ``index`` compute nothing, and layer ``index`` begins with ``state`` (B, L, C)."""
    replaced = [(vars(layer), vars(layer).get("forward")) for layer in layers[:index]]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return state

    try:
        for names, _ in replaced:
            names["forward"] = forward
        yield
    finally:
        for names, former in replaced:
            if former is None:
                names.pop("forward", None)
            else:
                names["forward"] = former
