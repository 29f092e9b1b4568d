"""What routing must know of a decoder layer, found out by looking at what the layer does in dry runs.

Each fact is the one of a few possibilities under which the formula gives what the layer's own attention function
gets. Where none does, the layer is refused, and the sentence says which fact it was.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from reroute_kernels import RMSNorm, Rope
from reroute_kernels.reference import rotate

from ...errors import UnsupportedModelError
from .dry_run import EPSILONS, FAR, ROWS, DryRun, Inputs, Seen
from .places import PER_TOKEN

if TYPE_CHECKING:
    from .base import ModelAdapter

__all__ = ["LayerFacts", "alike", "check_arguments", "layer_facts", "refusal", "rms_norm_of", "rotated", "without_gate"]

ARGUMENTS = (
    "hidden_states",
    "attention_mask",
    "position_ids",
    "position_embeddings",
    "cache",
    "past_key_values",
    "past_key_value",
    "use_cache",
    "output_attentions",
    "output_router_logits",
    "cache_position",
    "shared_kv_states",
)
"""What a layer may be called with. Whatever else it takes may have an entry for each token."""
OPTIONS = ("scaling", "dropout", "position_ids", "is_causal", "use_cache", "output_attentions", "sliding_window")
"""Keyword arguments of attention functions that change no score, but for the scale, or that are looked at elsewhere."""
COUNTERS = ("arange", "cumsum")
"""What code that counts the rows present calls."""


@dataclass(frozen=True)
class LayerFacts:
    """How a layer makes scores.

    - ``input_norm``: its child that the input of attention comes from; None if that is what the layer gets.
    - ``query_norm``, ``key_norm``: children of the attention that norm each head, before the rotation; or behind it,
      if ``norms_come_last``.
    - ``query_factor``: what queries are multiplied by then.
    - ``has_query_gate``: whether each head that ``q_proj`` returns has as many features of a gate behind its own.
    - ``has_rms_input_norm``, ``has_rms_key_norm``: whether these norms compute what ``RMSNorm`` does.
    - ``rotates``: whether positions turn queries and keys at all; ``rope`` says how, if they do.
    - ``head_dim``: features of a head that the attention function gets; ``heads``: how many query and key heads.
    - ``scaling``: the factor on logits.
    - ``window``: how far the layer looks back; None if to the first token.
    - ``is_causal``: whether without a mask a token sees only what comes before it.
    """

    input_norm: str | None
    query_norm: str | None
    key_norm: str | None
    norms_come_last: bool
    query_factor: float
    has_query_gate: bool
    has_rms_input_norm: bool
    has_rms_key_norm: bool
    rotates: bool
    rope: Rope
    head_dim: int
    heads: tuple[int, int]
    scaling: float
    window: int | None
    is_causal: bool


def refusal(what: str, layer: Any, index: int) -> UnsupportedModelError:
    """The error for a layer of which ``what`` is not known."""
    return UnsupportedModelError(
        f"Decoder layer {index} ({type(layer).__name__}) cannot be routed: {what}. What routing knows of a layer has "
        "to be what the layer does; disable routing for this model."
    )


def layer_facts(adapter: ModelAdapter, index: int, run: DryRun, inputs: Inputs) -> LayerFacts:
    """The facts of layer ``index`` of a model, from dry runs on ``inputs``.

    Raises:
        UnsupportedModelError: one of them cannot be found out; says which.
    """
    layer = adapter.layers[index]
    of = getattr(layer, adapter.attention)
    counts_from = adapter.counts_from(index)
    _check_code(layer, of, index, run, may_count=counts_from is not None)
    plain = _seen(layer, index, run, inputs.unrotated())
    turned = _seen(layer, index, run, inputs)
    _check_call(layer, index, plain, inputs)
    if counts_from is not None:
        _check_counts(layer, index, turned, run(inputs, min(counts_from, FAR) - ROWS))
    input_norm = _input_norm(layer, index, run, plain, inputs.hidden)
    heads = (-1, plain.query.shape[-1])
    rotates = not (torch.equal(plain.query, turned.query) and torch.equal(plain.key, turned.key))
    query, keys = run.projections.queries(plain.rows[0])[0], run.projections.keys(plain.rows[1])[0]
    has_gate = query.shape[-1] == 2 * plain.query.shape[0] * heads[1]
    query = without_gate(query, heads[1]).flatten(-2) if has_gate else query
    factors = (1.0, *(value for value in vars(run.attention).values() if isinstance(value, float)))
    query_norm, factor = _head_norm(layer, index, run, 0, query, plain.query, factors)
    key_norm, _ = _head_norm(layer, index, run, 1, keys, plain.key)
    norms = query_norm and getattr(run.attention, query_norm), key_norm and getattr(run.attention, key_norm)
    rope, comes_last = _rope(layer, index, plain, turned, inputs, (query, keys), norms) if rotates else ("half", False)
    return LayerFacts(
        input_norm=input_norm,
        query_norm=query_norm,
        key_norm=key_norm,
        norms_come_last=comes_last,
        query_factor=factor,
        has_query_gate=has_gate,
        has_rms_input_norm=input_norm is not None and _is_rms_norm(getattr(run.layer, input_norm)),
        has_rms_key_norm=key_norm is not None and _is_rms_norm(getattr(run.attention, key_norm)),
        rotates=rotates,
        rope=rope,
        head_dim=heads[1],
        heads=(plain.query.shape[0], plain.key.shape[0]),
        scaling=_scaling(plain),
        window=plain.options.get("sliding_window"),
        is_causal=bool(getattr(of, "is_causal", True)),
    )


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether two results of the same arithmetic are equal but for its order."""
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def rms_norm_of(norm: Any) -> RMSNorm:
    """The formula with the weight and epsilon of ``norm``, of which it is known to be right."""
    eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return RMSNorm(norm.weight, eps)


def check_arguments(layer: Any, index: int, run: DryRun) -> None:
    """Refuse a layer that takes more than is known. Raises UnsupportedModelError."""
    has_no_inputs = getattr(layer, "hidden_size_per_layer_input", None) == 0
    unused = ("per_layer_input",) if has_no_inputs else ()
    unknown = sorted(set(run.arguments).difference(ARGUMENTS, PER_TOKEN, unused))
    if unknown:
        raise refusal(f"it also takes {', '.join(unknown)}, which may have an entry for each token", layer, index)


def _check_code(layer: Any, of: Any, index: int, run: DryRun, *, may_count: bool) -> None:
    """What no run on a few rows can show."""
    check_arguments(layer, index, run)
    counted = [name for part in (layer, of) for name in COUNTERS if name in _names(type(part).forward)]
    if counted and not may_count:
        raise refusal(
            f"its code counts the rows that are present ({counted[0]}), and routing leaves some out", layer, index
        )
    if any(isinstance(module, torch.nn.modules.conv._ConvNd) for module in layer.modules()):
        raise refusal(
            "it has a convolution, which looks at neighbouring rows, and routing leaves some out", layer, index
        )


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return () if code is None else code.co_names


def _seen(layer: Any, index: int, run: DryRun, inputs: Inputs) -> Seen:
    try:
        seen = run(inputs)
    except Exception as error:
        why = f"it cannot be run on a few rows to see what it hands to attention ({type(error).__name__}: {error})"
        raise refusal(why, layer, index) from None
    if seen is None:
        raise refusal("it has an attention of its own, which calls no attention function of Transformers", layer, index)
    return seen


def _check_call(layer: Any, index: int, seen: Seen, inputs: Inputs) -> None:
    """Refuse what else the attention function gets, and what else has its part in the queries and keys."""
    options = [name for name, value in seen.options.items() if name not in OPTIONS and value is not None]
    if options:
        raise refusal(f"its attention function also gets {', '.join(options)}", layer, index)
    if not isinstance(seen.mask, Tensor) or not torch.equal(seen.mask, inputs.mask):
        raise refusal("its attention function gets another mask than the layer", layer, index)


def _input_norm(layer: Any, index: int, run: DryRun, seen: Seen, hidden: Tensor) -> str | None:
    """The child of ``layer`` that makes what its projections get of its input."""
    for name, norm in _norms(run.layer, hidden.shape[-1:]):
        if all(alike(rows, norm(hidden)) for rows in seen.rows):
            return name
    if all(alike(rows, hidden) for rows in seen.rows):
        return None
    raise refusal("none of its norms makes what its query and key projections get", layer, index)


def _head_norm(
    layer: Any,
    index: int,
    run: DryRun,
    which: int,
    projected: Tensor,
    expected: Tensor,
    factors: Sequence[float] = (1.0,),
) -> tuple[str | None, float]:
    """The child of the attention, and the one of ``factors``, that make ``expected`` (H, R, D) of ``projected``."""
    expected = expected.transpose(0, 1)
    if projected.shape[-1] == expected.shape[1:].numel():
        projected = projected.unflatten(-1, expected.shape[1:])
        shapes = expected.shape[2:], expected.shape[1:]  # one for all heads, or of each its own
        norms = [(None, projected), *((name, norm(projected)) for name, norm in _norms(run.attention, *shapes))]
        for factor, (name, normed) in itertools.product(factors, norms):
            if alike(expected, factor * normed):
                return name, factor
    name = run.projections.names[which]
    raise refusal(
        f"its attention function gets neither what {name!r} returns nor a norm of each head of it", layer, index
    )


def without_gate(projected: Tensor, head_dim: int) -> Tensor:
    """Queries (R, H, D) of ``projected`` (R, H * 2 D), in which a gate comes behind each head."""
    heads: Tensor = projected.unflatten(-1, (-1, 2 * head_dim))
    return heads[..., :head_dim]


def _norms(module: Any, *shapes: torch.Size) -> Iterator[tuple[str, Any]]:
    """The children of ``module`` whose weights, if they have any, are of one of these ``shapes``, by name."""
    for name, child in module.named_children():
        weights = list(child.parameters())
        is_norm = bool(weights) or any(hasattr(child, eps) for eps in EPSILONS)
        if is_norm and all(weight.shape in shapes for weight in weights):
            yield name, child


def _rope(
    layer: Any, index: int, plain: Seen, turned: Seen, inputs: Inputs, projected: tuple[Tensor, Tensor], norms: Any
) -> tuple[Rope, bool]:
    """How heads are rotated, and whether their norms, of which kernels can run the formula, come behind that."""
    after, rope = (turned.query, turned.key), None
    for rope in get_args(Rope):
        if all(
            alike(its, rotated(one, inputs, rope)) for its, one in zip(after, (plain.query, plain.key), strict=True)
        ):
            return rope, False
    if all(norm and _is_rms_norm(norm) for norm in norms):
        for rope in get_args(Rope):
            heads = (
                one.unflatten(-1, (-1, its.shape[-1])).transpose(0, 1)
                for one, its in zip(projected, after, strict=True)
            )
            made = (norm(rotated(one, inputs, rope)) for norm, one in zip(norms, heads, strict=True))
            if all(map(alike, after, made)):
                return rope, True
    raise refusal(
        f"it rotates queries and keys in another way than is known ({', '.join(get_args(Rope))})", layer, index
    )


def rotated(heads: Tensor, inputs: Inputs, rope: Rope) -> Tensor:
    """``heads`` (H, R, D) rotated by the tables of ``inputs``."""
    return rotate(heads.transpose(0, 1), inputs.cos[0], inputs.sin[0], rope).transpose(0, 1)


def _check_counts(layer: Any, index: int, seen: Seen, later: Seen | None) -> None:
    """Refuse a layer that makes something else of rows behind others, ``later``."""
    if later is None or not (torch.equal(seen.query, later.query) and torch.equal(seen.key, later.key)):
        raise refusal("it makes other queries and keys of rows behind others than is known", layer, index)


def _scaling(seen: Seen) -> float:
    given = seen.options.get("scaling")
    return float(seen.query.shape[-1] ** -0.5 if given is None else given)


def _is_rms_norm(norm: Any) -> bool:
    """Whether ``norm``, of a dry run, computes what ``RMSNorm`` does, to the last bit of both dtypes."""
    if [name for name, _ in norm.named_parameters()] != ["weight"] or not hasattr(norm, "forward"):
        return False
    if not any(hasattr(norm, eps) for eps in EPSILONS):
        return False
    rows = torch.linspace(-3, 3, 64 * norm.weight.numel()).sin().unflatten(0, (64, -1))
    for dtype in (torch.float32, torch.bfloat16):
        formula, given = rms_norm_of(norm), rows.to(dtype)
        weight = formula.weight.to(dtype)
        if not torch.equal(formula._replace(weight=weight)(given), _with_weight(norm, weight)(given)):
            return False
    return True


def _with_weight(norm: Any, weight: Tensor) -> Callable[[Tensor], Tensor]:
    def run(rows: Tensor) -> Tensor:
        result: Tensor = torch.func.functional_call(norm, {"weight": weight}, (rows,))
        return result

    return run
