"""Accuracy against what it costs, as SVG. Needs matplotlib, which is an optional extra: ``pip install .[figures]``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from reroute.core.action import Action
from reroute.report import Cost, Results, Row, Setup

__all__ = ["COSTS", "draw"]

COSTS: Final[dict[str, tuple[str, Callable[[Cost], float]]]] = {
    "flops": ("prefill FLOPs, % of dense", lambda cost: cost.flops),
    "kv": ("KV bytes, % of dense", lambda cost: cost.kv_bytes),
}
STYLES: Final[dict[Action, tuple[str, str]]] = {"route": ("-", "o"), "remove": ("--", "s")}


def draw(results: Mapping[str, Results], cost: str, path: Path) -> None:
    """A panel for each condition: a colour for each method, solid for routing and dashed for removing.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib
    from matplotlib.figure import Figure

    label, measure = COSTS[cost]
    with matplotlib.rc_context({"svg.hashsalt": "reroute", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(3.1 * len(results), 4.4), layout="constrained")
        panels = figure.subplots(1, len(results), sharey=True, squeeze=False)[0]
        for panel, (condition, its) in zip(panels, results.items(), strict=True):
            _panel(panel, its, measure)
            panel.set(title=condition, xlabel=label)
        panels[0].set_ylabel("mean accuracy of six families, %")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2 * len(results), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))


def _panel(panel: Any, results: Results, measure: Callable[[Cost], float]) -> None:
    from matplotlib import colormaps

    dense = results.dense
    share: Callable[[Row], float] = lambda row: 100 * measure(row.cost) / measure(dense.cost)
    methods = list(dict.fromkeys(row.setup.method for row in results.rows if row.setup.method))
    panel.axhline(100 * results.accuracy(dense), color="0.6", linewidth=1, label="dense")
    for number, method in enumerate(methods):
        for action, (line, mark) in STYLES.items():
            rows = [row for row in results.rows if (row.setup.method, row.setup.action) == (method, action)]
            if rows:
                panel.errorbar(
                    [share(row) for row in rows],
                    [100 * results.accuracy(row) for row in rows],
                    [100 * results.error(row) for row in rows],
                    color=colormaps["tab20"](number % 20),
                    linestyle=line,
                    marker=mark,
                    markersize=3,
                    linewidth=1,
                    label=Setup(method, action).name,
                )
    panel.grid(color="0.9", linewidth=0.5)
    panel.set_ylim(0, 102)
