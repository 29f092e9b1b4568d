"""The same selections where the host knows capacities only."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from reroute_kernels import Selection, SelectMetadata, SelectRows

BEYOND = 10**6  # in lists, where nothing is to be read


def within(rows: SelectRows, *, more: int = 3) -> SelectRows:
    """``rows`` in lists that are longer by ``more``, with the largest capacities that lists and starts allow."""
    candidates, text_rows, positions, metadata = rows
    counts = metadata.num_candidates, metadata.num_texts
    wide, wide_texts = (_longer(part, each, more) for part, each in zip((candidates, text_rows), counts, strict=True))
    starts = (*metadata.starts, positions.shape[0])
    kv_lens = tuple(end - start for start, end in pairwise(starts))
    most = tuple(min(wide.shape[1], length) for length in kv_lens)
    return SelectRows(
        wide,
        wide_texts,
        positions,
        SelectMetadata(
            metadata.starts,
            kv_lens,
            most,
            (wide_texts.shape[1],) * len(most),
            most,
            on_device=metadata.counts(candidates.device),
            static_length=metadata.compact_length + more,
        ),
    )


def fillers_last(selection: Selection, rows: SelectRows, wide: SelectRows) -> Selection:
    """The ``selection`` from ``rows`` as it is within the capacities of ``wide``: more fillers, all of them last."""
    length, active = wide.metadata.compact_length, rows.metadata.num_active
    old = rows.metadata.compact_length
    inverse_index = selection.inverse_index.clone()
    for b, count in enumerate(active):  # by the exact case's own numbers, sample by sample
        first = b * old + old - count
        mine = (selection.inverse_index >= first) & (selection.inverse_index < (b + 1) * old)
        inverse_index[mine] = selection.inverse_index[mine] - first + b * length

    def moved(compact: Tensor) -> Tensor:
        out = compact.new_full((len(active), length), -1)
        for row, source, count in zip(out, compact, active, strict=True):
            row[:count] = source[old - count :]
        return out

    return Selection(
        kept=_to(selection.kept, max(wide.metadata.k), -1),
        active_rows=moved(selection.active_rows),
        active_positions=moved(selection.active_positions),
        inverse_index=inverse_index,
        scores=_to(selection.scores, wide.candidates.shape[1], -torch.inf),
    )


def _to(rows: Tensor, width: int, value: float) -> Tensor:
    return pad(rows, (0, width - rows.shape[1]), value=value)


def _longer(rows: Tensor, counts: tuple[int, ...], more: int) -> Tensor:
    rows = _to(rows, rows.shape[1] + more, BEYOND)
    for row, count in zip(rows, counts, strict=True):
        row[count:] = BEYOND
    return rows
