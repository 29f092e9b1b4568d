"""What a prefill costs. FLOPs count a multiply-add as 2 and leave out norms, RoPE, softmax and activations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import RerouteError, unknown
from ..rankers import TowerShape
from .action import Action
from .layer_names import RECURRENT, ROW_BY_ROW
from .schedule import Schedule

__all__ = [
    "Attention",
    "CostEstimate",
    "ModelShape",
    "PrefillCost",
    "average_tokens",
    "estimate_cost",
    "kv_bytes",
    "layer_flops",
    "prefill_cost",
]

Attention = Literal["dense", "causal"]
"""How attention is counted: all pairs of a query and a key, or those that a causal mask leaves."""


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder with grouped-query attention and a gated MLP (three matrices).

    ``tower``: the vision tower's, of which some rankers compute more; None if that is not to be counted.
    ``recurrent``: layers that keep a state instead of keys, or nothing (an MLP alone). Their matrices are counted as
    those of the others, and neither pairs of a query and a key nor the state are.
    """

    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tower: TowerShape | None = None
    recurrent: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, text_config: Any) -> ModelShape:
        """Read the sizes from a Hugging Face text config, or anything with the same attributes.

        Of sizes that differ from layer to layer it is the mean.

        Raises:
            RerouteError: an attribute is missing.
        """
        try:
            hidden, heads = text_config.hidden_size, _size(text_config, "num_attention_heads")
            return cls(
                num_layers=text_config.num_hidden_layers,
                hidden=hidden,
                intermediate=_intermediate(text_config),
                heads=heads,
                kv_heads=_size(text_config, "num_key_value_heads", None) or heads,
                head_dim=_size(text_config, "head_dim", None) or hidden // heads,
                vocab=text_config.vocab_size,
                recurrent=tuple(i for i, kind in enumerate(_kinds(text_config)) if kind in (*RECURRENT, *ROW_BY_ROW)),
            )
        except AttributeError as error:
            raise RerouteError(
                f"Cannot read the model's sizes: {error}. "
                "Pass the config of the text decoder: model.config.get_text_config()."
            ) from None


def _kinds(text_config: Any) -> Sequence[str]:
    return (getattr(text_config, "layer_types", None) or ())[: text_config.num_hidden_layers]


def _intermediate(text_config: Any) -> int:
    """Of the MLP that each token runs: of experts that it is sent to and of the shared one, if there are only those."""
    said, ungated = _size(text_config, "intermediate_size", None), getattr(text_config, "ffn_dim", None)
    if said is None and ungated is not None:  # two matrices, of which three of this width have the size
        return int(ungated * 2 // 3)
    if said is not None or getattr(text_config, "moe_intermediate_size", None) is None:
        return int(_size(text_config, "intermediate_size"))
    shared = getattr(text_config, "shared_expert_intermediate_size", None) or 0
    return int(text_config.num_experts_per_tok * text_config.moe_intermediate_size + shared)


def _size(text_config: Any, name: str, *default: Any) -> Any:
    try:
        return getattr(text_config, name, *default)
    except RuntimeError:  # Transformers' own, where layers differ
        sizes = [getattr(text_config.per_layer_config[i], name) for i in range(text_config.num_hidden_layers)]
        return round(sum(sizes) / len(sizes))


def layer_flops(shape: ModelShape, tokens: int, keys: int | None = None, *, attention: Attention = "dense") -> int:
    """FLOPs of one decoder layer on ``tokens`` tokens, whose cache then holds ``keys`` rows (default: just these)."""
    if attention not in get_args(Attention):
        raise unknown("attention", attention, get_args(Attention))
    d, q, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    weights = 2 * d * q + 2 * d * kv + 3 * d * shape.intermediate
    pairs = tokens * (tokens if keys is None else keys)
    if attention == "causal":
        pairs -= tokens * (tokens - 1) // 2
    return 2 * tokens * weights + 4 * q * pairs


def kv_bytes(shape: ModelShape, lengths_per_layer: Sequence[int], bytes_per_element: int = 2) -> int:
    """Bytes of a KV cache whose layer i holds ``lengths_per_layer[i]`` tokens."""
    rows = sum(length for layer, length in enumerate(lengths_per_layer) if layer not in shape.recurrent)
    return 2 * shape.kv_heads * shape.head_dim * bytes_per_element * rows


@dataclass(frozen=True)
class PrefillCost:
    """What a prefill costs.

    - ``prefill_flops``: of the whole prefill, scoring included; ``scoring_flops``: of scoring alone.
    - ``kv_bytes``: size of the KV cache after the prefill.
    """

    prefill_flops: int
    scoring_flops: int
    kv_bytes: int


def prefill_cost(
    shape: ModelShape,
    tokens: Sequence[int],
    keys: Sequence[int] | None = None,
    *,
    scoring: int = 0,
    batch: int = 1,
    attention: Attention = "dense",
    lm_head: bool = False,
    bytes_per_element: int = 2,
) -> PrefillCost:
    """The cost of a prefill, from its counts alone: every budget and every statistic comes from here.

    Args:
        shape: the decoder.
        tokens: rows of a sample that each layer runs.
        keys: rows of a sample that each layer's cache then holds, earlier turns included (default: ``tokens``).
        scoring: FLOPs of ranking in all decisions and samples.
        batch: samples that run and store as many rows; fillers are rows.
        attention: see ``Attention``.
        lm_head: add the output head, on the one row per sample that generation needs.
        bytes_per_element: of a key or a value.
    """
    keys = [0 if i in shape.recurrent else count for i, count in enumerate(tokens if keys is None else keys)]
    alike = Counter(zip(tokens, keys, strict=True))
    layers = sum(count * layer_flops(shape, t, k, attention=attention) for (t, k), count in alike.items())
    head = 2 * shape.hidden * shape.vocab * lm_head
    stored = batch * kv_bytes(shape, keys, bytes_per_element)
    return PrefillCost(batch * (layers + head) + scoring, scoring, stored)


def average_tokens(counts_per_layer: Sequence[int]) -> float:
    """avg_T: mean over all layers of the visual tokens that a layer runs."""
    return sum(counts_per_layer) / len(counts_per_layer)


@dataclass(frozen=True)
class CostEstimate(PrefillCost):
    """What one prompt costs, and for how many visual tokens.

    ``avg_tokens``: avg_T, from rounded counts; ``keep``: avg_T / N.
    """

    avg_tokens: float
    keep: float


def estimate_cost(
    shape: ModelShape,
    schedule: Schedule,
    action: Action,
    visual: int,
    text: int,
    *,
    attention: Attention = "dense",
    lm_head: bool = False,
    bytes_per_element: int = 2,
) -> CostEstimate:
    """What a prompt of ``visual`` and ``text`` tokens costs under a schedule.

    A decision ranks the whole prompt with ``route``, what is left of it with ``remove``, and nothing if no token is to
    be deferred.

    Raises:
        RerouteError: the schedule does not fit the model or the action.
    """
    schedule.validate(shape.num_layers, action)
    counts = schedule.counts(visual)
    scoring, left, competing = 0, visual, []
    for ranker, kept, does in zip(schedule.rankers, counts, schedule.each_action(action), strict=True):
        competing.append(left)
        scoring += ranker.flops(shape, text + left, left, kept)
        left = kept if does == "remove" else left
    for layer, rankers in schedule.looks.items():
        left = competing[schedule.next_stage(layer)]
        scoring += sum(ranker.note_flops(shape, text + left, left) for ranker in rankers)
    per_layer = schedule.per_layer(visual, shape.num_layers)
    average = average_tokens(per_layer)
    cost = prefill_cost(
        shape,
        [text + kept for kept in per_layer],
        scoring=scoring if any(kept < visual for kept in counts) else 0,
        attention=attention,
        lm_head=lm_head,
        bytes_per_element=bytes_per_element,
    )
    return CostEstimate(**vars(cost), avg_tokens=average, keep=average / visual if visual else 1.0)
