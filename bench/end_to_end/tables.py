"""The results for people."""

from __future__ import annotations

from collections.abc import Sequence

from .decode import DecodeResult
from .flops import TEXT, FlopEstimate
from .interleaved import Spread
from .memory import MemoryResult
from .prefill import PREFILL, PrefillResult

__all__ = ["print_flops", "print_measured", "print_parts"]

PREFILL_TARGETS = {576: 0.42, 2304: 0.345}
SHARE_TARGET = 0.02
DECODE_TARGET = 1.03
MIB = 2**20

Row = tuple[str, ...]


def print_measured(
    prefills: Sequence[PrefillResult], decoded: DecodeResult, memories: Sequence[MemoryResult], *, targets: bool
) -> None:
    """Everything that was measured or counted. ``targets``: whether times are held against theirs."""
    rows: list[Row] = [("measured", "median", "p20 … p80", "target", "")]
    for result in prefills:
        name = f"prefill time, N={result.visual}, routed / dense"
        target = PREFILL_TARGETS[result.visual] if targets else None
        about = f"CPU time {result.cpu_ratio.median:.3f}, FLOP model {result.flops_ratio:.3f}"
        about += f", layers alone {result.layers_ratio.median:.3f}"
        about += f"; dense {result.dense_ms:.0f} ms, routed {result.routed_ms:.0f} ms"
        rows.append(_timed(name, result.ratio, target, about))
        routing = result.routing
        about = f"CPU time {routing.cpu_share.median:.1%}; key projection {routing.keys.median:.1%} besides"
        rows.append(
            _timed(
                "  of the routed prefill: routing itself",
                routing.share,
                SHARE_TARGET if targets else None,
                about,
                "{:.1%}",
            )
        )
    about = f"CPU time {decoded.cpu_ratio.median:.3f}; plain {decoded.plain_ms:.1f} ms on caches of {decoded.lengths}"
    rows.append(
        _timed(
            f"decode step, N={decoded.visual}, routed / plain", decoded.ratio, DECODE_TARGET if targets else None, about
        )
    )
    for count in memories:
        rows += _counted(count)
    _print(rows)


def print_parts(prefills: Sequence[PrefillResult]) -> None:
    """What routing spends its time on."""
    for result in prefills:
        parts = result.routing.parts
        wall, cpu = parts[PREFILL]
        rows: list[Row] = [(f"routed prefill, N={result.visual}", "ms", "%", "CPU ms", "%")]
        for name, (seconds, cpu_seconds) in parts.items():
            shares = f"{seconds / wall:.2%}", f"{cpu_seconds / cpu:.2%}"
            rows.append((name, f"{seconds:.2f}", shares[0], f"{cpu_seconds:.2f}", shares[1]))
        _print(rows)


def print_flops(modelled: Sequence[FlopEstimate]) -> None:
    """What the FLOP model says of real models."""
    rows: list[Row] = [(f"modelled, {TEXT} text tokens", "N", "", "budget", "avg_T", "TFLOP", "/ dense", "KV MiB")]
    for row in modelled:
        numbers = f"{row.avg_tokens:.1f}", f"{row.tflops:.2f}", f"{row.flops_ratio:.3f}", f"{row.kv_mib:.0f}"
        rows.append((row.model, str(row.visual), row.method, row.keep, *numbers))
    _print(rows)


def _timed(name: str, value: Spread, target: float | None, about: str, form: str = "{:.3f}") -> Row:
    goal = "" if target is None else f"<= {form.format(target)} {_verdict(value.median <= target)}"
    return name, form.format(value.median), f"{form.format(value.p20)} … {form.format(value.p80)}", goal, about


def _counted(count: MemoryResult) -> list[Row]:
    scratch = count.scratch
    return [
        (
            f"peak live bytes, {count.model}, L={count.length}, routed / dense",
            f"{count.routed_peak / count.dense_peak:.3f}",
            "",
            "",
            f"{_mib(count.routed_peak)} / {_mib(count.dense_peak)} MiB; routed peak in {count.peak_at}",
        ),
        (
            "  added by routing, MiB",
            _mib(count.extra),
            "",
            f"<= {_mib(count.promised)} {_verdict(count.extra <= count.promised)}",
            f"pool {_mib(count.pool)} + copy {_mib(count.compact)} + tables {_mib(count.tables)}; "
            f"held while layers run {_mib(count.held)}",
        ),
        (
            "  largest tensor of a decision, MiB",
            _mib(scratch.largest),
            "",
            f"< {_mib(count.attention)} {_verdict(scratch.largest < count.attention)}",
            f"{_mib(scratch.bytes)} in all = {scratch.bytes / count.length / 1024:.1f} KiB per token",
        ),
    ]


def _mib(size: int) -> str:
    return f"{size / MIB:.2f}"


def _verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def _print(rows: Sequence[Row]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    print()
    for name, *cells in rows:
        aligned = (f"{cell:>{width}}" for cell, width in zip(cells[:-1], others, strict=False))
        last = cells[-1] if len(cells[-1]) > 10 or not cells[-1] else f"{cells[-1]:>{others[-1]}}"
        print("  ".join((f"{name:{first}}", *aligned, last)).rstrip())
