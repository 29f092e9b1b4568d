"""The Triton kernels as PyTorch operators, ``torch.ops.reroute_kernels.*``, and with the signatures of the reference.

An operator is opaque to ``torch.compile`` and CUDA graph capture, has a fake kernel for tracing and a FLOP
formula. Each is defined once in a ``torch.library.Library``: that costs about 2 microseconds a call on the
host, against about 15 for ``torch.library.custom_op`` and ``triton_op`` (``python -m bench.kernels.overhead``). Nothing
of what those two add is wanted here: the operations have no gradient, as those of the reference have none.

Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .metadata import SelectMetadata
from .pool import Pages
from .ranking import picks_per_round
from .reference import AttentionSpec, RMSNorm, RopeTables, Selection, SelectRows
from .triton_kernels import defer_rmsnorm as _defer_rmsnorm
from .triton_kernels import diverse as _diverse
from .triton_kernels import rows as _rows
from .triton_kernels import score as _score
from .triton_kernels import select as _select

NAMESPACE = __name__.rpartition(".")[0].replace(".", "_")  # a copy under another name has operators of its own
_library = torch.library.Library(NAMESPACE, "DEF")


def _register(
    schema: str, run: Callable[..., Any], fake: Callable[..., Any], flops: Callable[..., int]
) -> torch._ops.OpOverload[..., Any]:
    """Define the operator ``schema`` and return it; ``flops`` takes shapes where ``run`` takes tensors."""
    name = _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    # For every device: CPU tensors are for the interpreter. The choice of a backend is made in `dispatch`.
    _library.impl(name, _where_its_tensors_are(run), "CompositeExplicitAutograd")
    # No gradients: without this, PyTorch looks for a formula whenever an input requires one.
    _library.impl(name, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    register_flop_formula(packet)(flops)
    overload: torch._ops.OpOverload[..., Any] = packet.default
    return overload


def _where_its_tensors_are(run: Callable[..., Any]) -> Callable[..., Any]:
    """``run`` with the GPU of its first tensor as the current one: Triton launches there, wherever the tensors are."""

    @wraps(run)
    def guarded(first: Tensor, *rest: Any) -> Any:
        device = first.device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return run(first, *rest)
        return run(first, *rest)

    return guarded


def _no_flops(*_: object, **__: object) -> int:
    return 0


# --- defer and admit -------------------------------------------------------------------------


def _fake_admit(pages: Tensor, table: Tensor, rows: Tensor, aux: Sequence[Tensor]) -> list[Tensor]:
    _rows.check_admit(pages)
    hidden = pages.new_empty(*rows.shape, pages.shape[2])
    return [hidden, *(tensor.new_empty(*rows.shape, tensor.shape[1]) for tensor in aux)]


defer = _register(
    "defer(Tensor(a!) pages, Tensor table, Tensor rows, Tensor hidden) -> ()",
    _rows.defer,
    lambda pages, table, rows, hidden: _rows.check_defer(pages, rows, hidden),
    _no_flops,
)
_admit = _register(
    "admit(Tensor pages, Tensor table, Tensor rows, Tensor[] aux) -> Tensor[]",
    _rows.admit,
    _fake_admit,
    _no_flops,
)


def admit(pages: Tensor, table: Tensor, rows: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
    """``reroute_kernels.reference.admit`` by the Triton kernel."""
    return tuple(_admit(pages, table, rows, aux))


# --- defer_rmsnorm -----------------------------------------------------------------------------


def _fake_defer_rmsnorm(
    pages: Tensor, table: Tensor, inverse_index: Tensor, hidden: Tensor, weight: Tensor, eps: float
) -> Tensor:
    _defer_rmsnorm.check_inputs(pages, table, inverse_index, hidden, weight)
    dtype = torch.promote_types(pages.dtype, weight.dtype)
    return pages.new_empty(table.shape[0] * pages.shape[1], pages.shape[2], dtype=dtype)


_defer_rmsnorm_op = _register(
    "defer_rmsnorm(Tensor(a!) pages, Tensor table, Tensor inverse_index, Tensor hidden, Tensor weight, float eps) "
    "-> Tensor",
    _defer_rmsnorm.defer_rmsnorm,
    _fake_defer_rmsnorm,
    _no_flops,
)


def defer_rmsnorm(lease: Pages, rows: Tensor, inverse_index: Tensor, hidden: Tensor, norm: RMSNorm) -> Tensor:
    """``reroute_kernels.reference.defer_rmsnorm`` by the Triton kernel, which needs only ``inverse_index``."""
    normed: Tensor = _defer_rmsnorm_op(lease.pages, lease.table, inverse_index, hidden, *norm)
    return normed


# --- select, score_topk and diverse_topk -----------------------------------------------------

# Operators take no objects: arguments are flat, and a SelectMetadata is a tensor, one list of integers and its length.
_COUNTS = "Tensor counts, int[] host_counts, int? static_length"
_SELECTION = "(Tensor kept, Tensor active_rows, Tensor active_positions, Tensor inverse_index, Tensor scores)"


@lru_cache(maxsize=256)
def _metadata(counts: tuple[int, ...], static_length: int | None) -> SelectMetadata:
    batch = len(counts) // 5
    starts, kv_lens, num_candidates, num_texts, k = (counts[i * batch : (i + 1) * batch] for i in range(5))
    return SelectMetadata(starts, kv_lens, num_candidates, num_texts, k, static_length=static_length)


def _fake_selection(
    candidates: Tensor, positions: Tensor, counts: Sequence[int], static_length: int | None
) -> Selection:
    (batch, widest), metadata = candidates.shape, _metadata(tuple(counts), static_length)
    return Selection(
        kept=candidates.new_empty(batch, max(metadata.k)),
        active_rows=candidates.new_empty(batch, metadata.compact_length),
        active_positions=candidates.new_empty(batch, metadata.compact_length),
        inverse_index=positions.new_empty(positions.shape),
        scores=candidates.new_empty(batch, widest, dtype=torch.float32),
    )


def _run_select(*arguments: Any) -> Selection:
    scores, candidates, texts, positions, counts, host_counts, static_length = arguments
    rows = SelectRows(candidates, texts, positions, _metadata(tuple(host_counts), static_length))
    return _select.select(scores, rows, counts=counts)


def _fake_score_topk(*arguments: Any) -> Selection:
    query, keys, *tables, candidates, _, positions, _, host_counts, static_length = arguments[:11]
    _score.check_inputs(query, keys, RopeTables(*tables), _attention_spec(*arguments[11:]))
    return _fake_selection(candidates, positions, host_counts, static_length)


def _run_score_topk(*arguments: Any) -> Selection:
    query, keys, *tables, candidates, texts, positions, counts, host_counts, static_length = arguments[:11]
    rows = SelectRows(candidates, texts, positions, _metadata(tuple(host_counts), static_length))
    spec = _attention_spec(*arguments[11:])
    return _score.score_topk(query, keys, RopeTables(*tables), rows, spec, counts=counts)


def _fake_diverse_topk(*arguments: Any) -> Selection:
    states, candidates, _, positions, _, host_counts, static_length = arguments
    _diverse.check_inputs(states)
    return _fake_selection(candidates, positions, host_counts, static_length)


def _run_diverse_topk(*arguments: Any) -> Selection:
    states, candidates, texts, positions, counts, host_counts, static_length = arguments
    rows = SelectRows(candidates, texts, positions, _metadata(tuple(host_counts), static_length))
    return _diverse.diverse_topk(states, rows, counts=counts)


def _attention_spec(scale: float, rope: Any, weight: Tensor | None, eps: float) -> AttentionSpec:
    return AttentionSpec(scale, rope, None if weight is None else RMSNorm(weight, eps))


def _score_flops(*arguments: Any, **_: object) -> int:
    """Of the logits: 2 H D for every key row of a sample with candidates; of capacities, as many as there may be."""
    query, metadata = arguments[0], _metadata(tuple(arguments[9]), arguments[10])
    return 2 * query[1] * query[2] * sum(n for n, c in zip(metadata.kv_lens, metadata.num_candidates, strict=True) if c)  # type: ignore[no-any-return]


def _diverse_flops(*arguments: Any, **_: object) -> int:
    """Of each candidate: its norm, its part in the sum of all, and 2 C for that sum and every pick that is compared."""
    states, metadata = arguments[0], _metadata(tuple(arguments[5]), arguments[6])
    rounds = [(n, picks_per_round(k)) for n, k in zip(metadata.num_candidates, metadata.k, strict=True) if k]
    return 2 * states[1] * sum(n * (3 + sum(counts[:-1])) for n, counts in rounds)  # type: ignore[no-any-return]


_select_op = _register(
    f"select(Tensor scores, Tensor candidates, Tensor text_rows, Tensor positions, {_COUNTS}) -> {_SELECTION}",
    _run_select,
    lambda *arguments: _fake_selection(arguments[1], arguments[3], *arguments[5:]),
    _no_flops,
)
_score_op = _register(
    "score_topk(Tensor query, Tensor keys, Tensor cos, Tensor sin, Tensor query_rows, Tensor candidates, "
    f"Tensor text_rows, Tensor positions, {_COUNTS}, float scale, str rope, Tensor? norm_weight, float norm_eps) "
    f"-> {_SELECTION}",
    _run_score_topk,
    _fake_score_topk,
    _score_flops,
)


_diverse_op = _register(
    f"diverse_topk(Tensor states, Tensor candidates, Tensor text_rows, Tensor positions, {_COUNTS}) -> {_SELECTION}",
    _run_diverse_topk,
    _fake_diverse_topk,
    _diverse_flops,
)


def select(scores: Tensor, rows: SelectRows) -> Selection:
    """``reroute_kernels.reference.select`` by the Triton kernel."""
    *lists, metadata = rows
    counts = metadata.counts(scores.device), metadata.flat, metadata.static_length
    return Selection(*_select_op(scores, *lists, *counts))


def score_topk(query: Tensor, keys: Tensor, tables: RopeTables, rows: SelectRows, spec: AttentionSpec) -> Selection:
    """``reroute_kernels.reference.score_topk`` by the Triton kernels."""
    *lists, metadata = rows
    counts = metadata.counts(query.device), metadata.flat, metadata.static_length
    norm = spec.key_norm or (None, 0.0)
    return Selection(*_score_op(query, keys, *tables, *lists, *counts, spec.scale, spec.rope, *norm))


def diverse_topk(states: Tensor, rows: SelectRows) -> Selection:
    """``reroute_kernels.reference.diverse_topk`` by the Triton kernels."""
    *lists, metadata = rows
    counts = metadata.counts(states.device), metadata.flat, metadata.static_length
    return Selection(*_diverse_op(states, *lists, *counts))
