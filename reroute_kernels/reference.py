"""The same operations in plain PyTorch: the specification, the ``torch`` backend, the test oracle.

Shapes follow from host integers (``SelectMetadata``), so that no operation waits for the device and every shape is
known before a kernel runs.

Two kinds of row numbers occur. A *pool row* counts over the whole lease, page tails included; a
*sample row* counts from its sample's first row. In both, -1 is a filler. Scored rows are mostly all
rows of a lease, and are numbered like pool rows then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .metadata import SelectMetadata
from .ranking import diversity_scores, ranked

if TYPE_CHECKING:
    from .pool import Pages

Rope = Literal["half", "interleaved"]

_LAST = torch.iinfo(torch.int64).max
"""Sorts behind every row."""


class SelectRows(NamedTuple):
    """What is selected from; what lies beyond a sample's counts is never read.

    Attributes:
        candidates: (B, Nmax) int64 sample rows, ascending, then -1.
        text_rows: (B, Mmax) likewise, disjoint from the candidates.
        positions: (R,) int64, a number for each scored row, which the selection hands on for the active ones.
        metadata: the counts.
    """

    candidates: Tensor
    text_rows: Tensor
    positions: Tensor
    metadata: SelectMetadata


class RopeTables(NamedTuple):
    """Rotary tables of the scored rows, and which of these are queries.

    Attributes:
        cos: (R, rot), each angle at both places of its pair.
        sin: (R, rot) likewise.
        query_rows: (B,) int64, the scored row of each sample's query; read for samples with candidates only.
    """

    cos: Tensor
    sin: Tensor
    query_rows: Tensor

    def unrotated(self) -> RopeTables:
        """Tables of the same size that turn nothing."""
        return self._replace(cos=torch.ones_like(self.cos), sin=torch.zeros_like(self.sin))


class Selection(NamedTuple):
    """What was decided.

    Attributes:
        kept: (B, Kmax) int64, ascending indices into the sample's candidates, then -1.
        active_rows: (B, S) int64, fillers -1, then the ascending scored rows of text and kept candidates; fillers come
            last if ``SelectMetadata.static_length`` is set.
        active_positions: (B, S) int64, the position of each active row, and -1 for fillers.
        inverse_index: (R,) int64, where each scored row is in the flattened ``active_rows``, -1 where it is deferred.
        scores: (B, Nmax) fp32 in candidate order, then -inf.
    """

    kept: Tensor
    active_rows: Tensor
    active_positions: Tensor
    inverse_index: Tensor
    scores: Tensor


class RMSNorm(NamedTuple):
    """The root-mean-square norm of Llama and its kin, of rows or of key heads; ``weight`` is (F,)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., F) over its root mean square, in fp32, and then times the weight in its own dtype."""
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


class AttentionSpec(NamedTuple):
    """The attention of a layer.

    Attributes:
        scale: factor on its logits.
        rope: which features rotate together.
        key_norm: of each key head, before the rotation.
    """

    scale: float
    rope: Rope = "half"
    key_norm: RMSNorm | None = None


@torch.no_grad()
def defer(pages: Tensor, table: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """Write compact rows in place to their slots in the pool, which keeps values and no autograd history.

    Args:
        pages: (P, page_size, C), contiguous.
        table: (T,) int64 page ids.
        rows: (B, S) int64 pool rows; a row may occur once, and -1 is skipped.
        hidden: (B, S, C).
    """
    if rows.numel() == 0 or table.numel() == 0:
        return
    memory, rows = pages.view(-1, pages.shape[-1]), rows.reshape(-1)
    values, filler = hidden.reshape(rows.shape[0], -1), rows < 0
    # Skipping needs a data-dependent shape. Instead fillers go to the slot of one real row, which is
    # written once more at the end; if all are fillers, that slot gets back what it holds.
    real = rows.argmax(0, keepdim=True)
    slots = _slots(table, rows.clamp(min=0), pages.shape[1])
    slot = slots.index_select(0, real)
    value = torch.where(filler.index_select(0, real), memory.index_select(0, slot), values.index_select(0, real))
    memory.index_copy_(0, torch.where(filler, slot, slots), values)
    memory.index_copy_(0, slot, value)


def admit(pages: Tensor, table: Tensor, rows: Tensor, *aux: Tensor) -> tuple[Tensor, ...]:
    """Gather pool rows; -1 becomes zeros.

    Args:
        pages: (P, page_size, C).
        table: (T,) int64 page ids.
        rows: (B, S) int64 pool rows.
        aux: (R, w) tensors of any dtype in pool-row order (cos, sin, position ids).

    Returns:
        (B, S, C) hidden states, and of each aux tensor (B, S, w).
    """
    flat = rows.reshape(-1)
    index = flat.clamp(min=0)
    real = (flat >> 63).to(torch.int8).bitwise_not_().unsqueeze(1)  # all bits of a real row, none of a filler

    def gather(source: Tensor, at: Tensor) -> Tensor:
        if source.shape[0] == 0:
            return source.new_zeros(*rows.shape, source.shape[1])
        taken = source.index_select(0, at)
        # On bits, so that NaN becomes zero too; much faster than a masked fill with a broadcast mask.
        taken.view(torch.int8).bitwise_and_(real)
        return taken.view(*rows.shape, source.shape[1])

    slots = _slots(table, index, pages.shape[1]) if table.numel() else index
    return gather(pages.view(-1, pages.shape[-1]), slots), *(gather(tensor, index) for tensor in aux)


def defer_rmsnorm(lease: Pages, rows: Tensor, inverse_index: Tensor, hidden: Tensor, norm: RMSNorm) -> Tensor:
    """Defer, and return all rows of the lease after a norm: what keys are projected from.

    Args:
        lease: whose rows.
        rows: (B, S) int64, the pool row of each compact row, -1 for fillers.
        inverse_index: (R,) int64, the same from the other side: where each pool row is in the flattened ``rows``, -1
            for rows that are deferred already.
        hidden: (B, S, C).
        norm: of C features.

    Returns:
        (R, C) in the order of pool rows.
    """
    defer(lease.pages, lease.table, rows, hidden)
    return norm(lease.rows())


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: Rope) -> Tensor:
    """Rotary embedding of x (n, heads, D) with cos and sin (n, rot), in the dtype of x.

    The first ``rot`` features rotate and the rest pass; rot = 0 means no rotary embedding. The pairs are
    (i, i + rot/2) for "half" and (2i, 2i + 1) for "interleaved"; cos and sin come as the model makes them, each angle
    at both places of its pair.

    Raises:
        ValueError: an unknown ``layout``.
    """
    cos, sin = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1)
    rot = cos.shape[-1]
    if layout == "half":
        first, second = slice(0, rot // 2), slice(rot // 2, rot)
    elif layout == "interleaved":
        first, second = slice(0, rot, 2), slice(1, rot, 2)
    else:
        raise ValueError(f"unknown rope layout {layout!r}; known: 'half', 'interleaved'")
    # In place on one copy: temporaries of the size of all keys cost more than the arithmetic.
    out = x * cos if rot == x.shape[-1] else torch.cat((x[..., :rot] * cos, x[..., rot:]), dim=-1)
    out[..., first].sub_(x[..., second] * sin[..., first])
    out[..., second].add_(x[..., first] * sin[..., second])
    return out


def select(scores: Tensor, rows: SelectRows) -> Selection:
    """The K_b best candidates of each sample: higher score first, then lower index.

    Args:
        scores: (B, Nmax) fp32. -0.0 equals +0.0, and a NaN of any sign ranks above everything, so that a broken score
            shows.
        rows: what is selected from.
    """
    candidates, text_rows, positions, metadata = rows
    (batch, max_candidates), max_texts, device = candidates.shape, text_rows.shape[1], candidates.device
    length, num_rows, max_k = metadata.compact_length, positions.shape[0], max(metadata.k)
    # Shapes are host integers, counts are read on the device: the operations are the same for every prompt within them.
    starts, _, n, m, k = metadata.counts(device).unsqueeze(-1)  # (B, 1) each
    is_exact = metadata.static_length is None
    no_candidate = _beyond(n, max_candidates, metadata.num_candidates if is_exact else None)
    no_text = _beyond(m, max_texts, metadata.num_texts if is_exact else None)
    not_kept = _beyond(k, max_k, metadata.k if is_exact else None)
    scores = _filled(scores.float(), no_candidate, -torch.inf)
    # The sort is stable, so what is no candidate ranks behind all candidates, even those of score -inf.
    kept = _filled(ranked(scores)[:, :max_k], not_kept, _LAST).sort().values
    kept = _filled(kept, not_kept, -1)
    # Where fillers go, they are sorted to.
    filler, gap = (-1, 0) if is_exact else (_LAST, max(length - max_texts - max_k, 0))
    chosen = candidates.gather(1, kept if not_kept is None else kept.clamp(min=0))
    listed = [_filled(text_rows, no_text, filler), _filled(chosen, not_kept, filler)]
    if gap:
        listed.append(candidates.new_full((batch, gap), filler))
    sample_rows = torch.cat(listed, 1).sort().values
    sample_rows = sample_rows[:, sample_rows.shape[1] - length :] if is_exact else sample_rows[:, :length]
    is_filler = None if is_exact and min(metadata.num_active) == length else sample_rows == filler
    active_rows = _filled(sample_rows + starts, is_filler, -1)
    # Fillers go to a spare last row.
    inverse_index = positions.new_full((num_rows + 1,), -1).index_copy_(
        0, _filled(active_rows, is_filler, num_rows).flatten(), torch.arange(batch * length, device=device)
    )[:num_rows]
    sources = active_rows if is_filler is None else active_rows.clamp(min=0)
    active_positions = positions.index_select(0, sources.flatten()).view_as(active_rows)
    return Selection(
        kept=kept,
        active_rows=active_rows,
        active_positions=_filled(active_positions, is_filler, -1),
        inverse_index=inverse_index,
        scores=scores,
    )


def score_topk(query: Tensor, keys: Tensor, tables: RopeTables, rows: SelectRows, spec: AttentionSpec) -> Selection:
    """Rank the candidates by the attention the last prompt token pays them, and select.

    The score is the mean over heads of the softmax over the sample's first ``kv_lens[b]`` rows (text and deferred rows
    included). Logits, softmax and mean are fp32 after a rotation in the model's dtype. Memory is O(H * L).

    Args:
        query: (B, H, D), the last prompt token's, before rotary embedding, after the model's own query norm.
        keys: (R, G, D) of all scored rows, before rotary embedding and before ``spec.key_norm``; head h uses key head
            h * G // H.
        tables: of the scored rows.
        rows: what is selected from. Candidates lie below ``kv_lens[b]``, text rows may lie beyond. Where the metadata
            are capacities, all rows within them are read, whatever they hold.
        spec: the layer's attention.

    Raises:
        ValueError: G does not divide H, or the norm is not of D features.
    """
    (cos, sin, query_rows), (scale, rope, key_norm) = tables, spec
    candidates, metadata = rows.candidates, rows.metadata
    if query.shape[1] % keys.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads cannot share {keys.shape[1]} key heads")
    if key_norm is not None and key_norm.weight.shape != keys.shape[2:]:
        raise ValueError(f"a key norm of {tuple(key_norm.weight.shape)} features is not one of {keys.shape[2]}")
    kv_lens = None if metadata.static_length is None else metadata.counts(query.device)[1]
    # One sample at a time: its result cannot depend on its neighbours in the batch.
    scores = []
    for b, (start, length, n) in enumerate(
        zip(metadata.starts, metadata.kv_lens, metadata.num_candidates, strict=True)
    ):
        if n == 0:
            scores.append(query.new_empty(0, dtype=torch.float32))
            continue
        last, span = query_rows[b : b + 1], slice(start, start + length)
        q = rotate(query[b : b + 1], cos.index_select(0, last), sin.index_select(0, last), rope)
        k = keys[span] if key_norm is None else key_norm(keys[span])
        k = rotate(k, cos[span], sin[span], rope)
        if kv_lens is None:
            scores.append(_attention(q, k, scale).index_select(0, candidates[b, :n]))
        else:
            unseen = torch.arange(k.shape[0], device=k.device) >= kv_lens[b]
            scores.append(_attention(q, k, scale, unseen).index_select(0, candidates[b, :n].clamp(0, k.shape[0] - 1)))
    padded = _stack(scores, candidates.shape[1], float("-inf"))
    return select(padded, rows)


def diverse_topk(states: Tensor, rows: SelectRows) -> Selection:
    """Select K_b candidates of each sample that are unlike each other, by ``ranking.diversity_scores``.

    Args:
        states: (R, C) of all scored rows, fp16, bf16 or fp32.
        rows: what is selected from.

    Raises:
        ValueError: its metadata are capacities. How many rows a round picks depends on k, which is needed on the host.
    """
    candidates, metadata = rows.candidates, rows.metadata
    if metadata.static_length is not None:
        raise ValueError("the torch backend makes a diverse selection by counts on the host, not within capacities")
    # One sample at a time: its result cannot depend on its neighbours in the batch.
    scores = [
        diversity_scores(states.index_select(0, candidates[b, :n] + start), k)
        for b, (start, n, k) in enumerate(zip(metadata.starts, metadata.num_candidates, metadata.k, strict=True))
    ]
    return select(_stack(scores, candidates.shape[1], float("-inf")), rows)


def _attention(query: Tensor, keys: Tensor, scale: float, unseen: Tensor | None = None) -> Tensor:
    """Head mean (L,) of the softmax of rotated query (1, H, D) against rotated keys (L, G, D), but ``unseen`` ones."""
    num_qo_heads, num_kv_heads = query.shape[1], keys.shape[1]
    grouped = query.float().view(num_kv_heads, num_qo_heads // num_kv_heads, -1)
    logits = grouped @ keys.float().permute(1, 2, 0) * scale
    if unseen is not None:
        logits = logits.masked_fill(unseen, -torch.inf)
    return logits.softmax(-1).view(num_qo_heads, -1).mean(0)


def _beyond(counts: Tensor, width: int, known: Sequence[int] | None) -> Tensor | None:
    """Places of (B, width) beyond ``counts`` (B, 1); None if the host has ``known`` that there are none."""
    return None if known and min(known) == width else torch.arange(width, device=counts.device) >= counts


def _filled(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    """``x`` with ``value`` where ``mask`` says so, if there is one."""
    return x if mask is None else x.masked_fill(mask, value)


def _slots(table: Tensor, rows: Tensor, page_size: int) -> Tensor:
    """Pool slots of pool rows (n,), none of them a filler."""
    return torch.add(rows % page_size, table.index_select(0, rows // page_size), alpha=page_size)


def _stack(parts: Sequence[Tensor], width: int, fill: float) -> Tensor:
    """Stack vectors to (B, width)."""
    gaps = (width - part.shape[0] for part in parts)
    return torch.stack(
        [pad(part, (0, gap), value=fill) if gap else part for part, gap in zip(parts, gaps, strict=True)]
    )
