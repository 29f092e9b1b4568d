"""What routing must compute, in the most obvious way: every layer on the full-length sequence, with masks.

No cache, no compaction, no hooks, nothing of the product. A conversation is one sequence of calls of the model: the
first with a prompt, later ones with more turns or with single generated tokens. In layer ``l`` only active tokens are
keys, and only their states change; everyone else keeps the state it has. Where parameters or ``embeds`` require
gradients, autograd records it, but for the scores.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from models import Sample, Tiny, text
from torch import Tensor

MARGIN = 1e-6
"""The margin rule: a selection is defined only where the scores of the last token kept and of the first one not kept
are further apart than this. Closer ones may swap with the rounding of a matrix product; exact ties are tested apart."""


@dataclass(frozen=True)
class Rules:
    """When and how decisions are made."""

    layers: tuple[int, ...]
    ratios: tuple[float, ...]
    action: Literal["route", "remove"] = "route"
    rounding: str = "floor"
    position_mode: str = "preserved"
    score_layer_offset: int = 0
    actions: tuple[Literal["route", "remove"], ...] = ()

    def removes(self, layer: int) -> bool:
        """Whether the decision before ``layer`` removes."""
        return (self.actions or (self.action,) * len(self.layers))[self.layers.index(layer)] == "remove"

    def steps(self, layer: int) -> list[str]:
        """What happens before ``layer``, in this order."""
        names = {"decide": layer - self.score_layer_offset, "enter": layer}
        order = reversed(names) if self.score_layer_offset else names
        return [name for name in order if names[name] in self.layers]

    def count(self, n: int, stage: int) -> int:
        """How many of ``n`` visual tokens stay."""
        exact = n * self.ratios[stage]
        if exact == 0:
            return 0
        if self.rounding == "half_even":
            return min(n, round(exact))
        least = 1 if self.rounding == "floor" else 0
        return min(n, max(least, math.floor(exact)))


@dataclass(frozen=True)
class Decision:
    """``kept`` and ``candidates`` count the visual tokens of their call; ``margin`` is explained at ``MARGIN``."""

    layer: int
    kept: list[int]
    candidates: list[int]
    scores: Tensor = field(repr=False)
    margin: float


@dataclass(frozen=True)
class Result:
    """``logits`` (L, V); ``hidden``: input of every layer and, normed, the output of the last, each (L, C).

    ``decisions[i]`` are those of call i, ``active`` (layers, L) tells who ran.
    """

    logits: Tensor
    hidden: list[Tensor]
    decisions: list[list[Decision]]
    active: Tensor

    @property
    def kv_lengths(self) -> list[int]:
        """What each layer's cache holds in the end."""
        return self.active.sum(1).tolist()

    @property
    def margin(self) -> float:
        """The smallest of all decisions."""
        return min((d.margin for call in self.decisions for d in call), default=math.inf)


def predict(
    tiny: Tiny,
    calls: Sample | Sequence[Sample],
    rules: Rules,
    *,
    then: Sequence[int] = (),
    query: int | None = None,
    embeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> Result:
    """Run a conversation: ``calls``, and ``then`` generated tokens one by one.

    ``query`` is the position in the first call of the token whose attention decides there (default: its last one).
    ``embeds`` (L, C) are what the decoder starts from, instead of the embedded conversation; ``positions`` are its
    position ids, (L,) or (3, L), instead of those that the model would take.
    """
    calls = [calls] if isinstance(calls, Sample) else list(calls)
    calls += [text(token) for token in then]
    whole = Sample(())
    turns: list[_Turn] = []
    for call in calls:
        start = len(whole)
        last = query if query is not None and not turns else len(call) - 1
        turns.append(_Turn(start, start + last, [start + i for i in call.visual]))
        whole += call
    base = tiny.model.model.language_model
    states = tiny.embeds(whole) if embeds is None else embeds
    positions = tiny.positions(whole) if positions is None else positions
    return run(base, tiny.model.lm_head, states, positions, turns, rules)


@dataclass(frozen=True)
class _Turn:
    """One call: its first position, its query's, and those of its visual tokens; ``rules`` of its own, if any."""

    start: int
    query: int
    visual: list[int]
    rules: Rules | None = None


def run(
    decoder: Any,
    head: Any,
    states: Tensor,
    positions: Tensor,
    turns: Sequence[_Turn],
    rules: Rules,
    *,
    visible: Tensor | None = None,
) -> Result:
    """``states`` (L, C) at ``positions`` (L,) or (3, L) through ``decoder`` and ``head``.

    ``visible`` (L, L): who may see whom, itself included; by default all that came before.
    """
    length, depth = len(states), len(decoder.layers)
    causal = torch.ones(length, length, dtype=torch.bool).tril() if visible is None else visible
    active, gone = torch.ones(length, dtype=torch.bool), torch.zeros(length, dtype=torch.bool)
    rope = _rope(decoder, states, positions)
    decisions: list[list[Decision]] = [[] for _ in turns]
    chosen: list[Decision | None] = [None] * len(turns)
    hidden, history = [], []
    for index, layer in enumerate(decoder.layers):
        hidden.append(states)
        active = active.clone()
        for i, turn in enumerate(turns):
            its = turn.rules or rules
            for step in its.steps(index) if turn.visual else ():
                if step == "decide":
                    stage = its.layers.index(index - its.score_layer_offset)
                    with torch.no_grad():
                        weights = _attention(layer.self_attn, layer.input_layernorm(states), rope)
                        chosen[i] = _decide(its, stage, weights, turn, gone)
                elif (decision := chosen[i]) is not None:
                    active[turn.visual] = False
                    active[[turn.visual[k] for k in decision.kept]] = True
                    if its.removes(index):
                        gone[turn.visual] = ~active[turn.visual]
                    decisions[i].append(decision)
                    if its.position_mode == "renumbered":
                        rope = _rope(decoder, states, ((causal & active).sum(1) - 1).clamp(min=0))
        new = _block(layer, states, rope, causal & active)
        states = torch.where(active[:, None], new, states)
        history.append(active)
    assert len(hidden) == depth
    hidden.append(decoder.norm(states))
    return Result(head(hidden[-1]), hidden, decisions, torch.stack(history))


def _decide(rules: Rules, stage: int, weights: Any, turn: _Turn, gone: Tensor) -> Decision:
    pool = [i for i in range(turn.start, turn.query + 1) if not gone[i]]
    candidates = [i for i in range(len(turn.visual)) if not gone[turn.visual[i]]]
    row = weights(queries=[turn.query], keys=pool)[:, 0].mean(0)  # (H, 1, P) -> (P,): mean of probabilities
    score = dict(zip(pool, row.tolist(), strict=True))
    ranked = sorted(candidates, key=lambda i: (-score[turn.visual[i]], i))
    count = rules.count(len(turn.visual), stage)
    assert count <= len(ranked), "a removed token cannot return"
    margin = math.inf
    if 0 < count < len(ranked):
        last, first = (score[turn.visual[ranked[i]]] for i in (count - 1, count))
        margin = last - first
    scores = torch.tensor([score[turn.visual[i]] for i in candidates])
    return Decision(rules.layers[stage], sorted(ranked[:count]), candidates, scores, margin)


# --- one layer ----------------------------------------------------------------------------------------------------


def _block(layer: Any, states: Tensor, rope: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
    attn = layer.self_attn
    normed = layer.input_layernorm(states)
    everyone = list(range(len(states)))
    # A row that may see nobody is nobody's key, and its output is thrown away.
    allowed = allowed | torch.eye(len(states), dtype=torch.bool)
    weights = _attention(attn, normed, rope)(everyone, everyone, allowed)  # (H, L, L)
    values = _heads(attn.v_proj(normed), attn.head_dim)
    values = values.repeat_interleave(len(weights) // len(values), dim=0)
    mixed = (weights @ values).transpose(0, 1).flatten(1)
    states = states + attn.o_proj(mixed)
    out: Tensor = states + layer.mlp(layer.post_attention_layernorm(states))
    return out


def _attention(attn: Any, normed: Tensor, rope: tuple[Tensor, Tensor]) -> Any:
    """Probabilities of ``queries`` over ``keys`` (lists of positions), all of them visible unless ``allowed`` says."""
    q = _rotate(_heads(attn.q_proj(normed), attn.head_dim), rope)
    k = _rotate(_heads(attn.k_proj(normed), attn.head_dim), rope)
    k = k.repeat_interleave(len(q) // len(k), dim=0)

    def weights(queries: list[int], keys: list[int], allowed: Tensor | None = None) -> Tensor:
        logits: Tensor = q[:, queries] @ k[:, keys].transpose(1, 2) * attn.scaling
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -math.inf)
        return logits.softmax(-1)

    return weights


def _heads(x: Tensor, head_dim: int) -> Tensor:
    heads: Tensor = x.unflatten(-1, (-1, head_dim))
    return heads.transpose(0, 1)


def _rope(decoder: Any, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    cos, sin = decoder.rotary_emb(states[None], positions.unsqueeze(-2))
    return cos[0], sin[0]


def _rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], dim=-1)
    return x * cos + turned * sin
