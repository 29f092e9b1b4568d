"""What a user says of graphs, and what is said to a user."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import finite, is_count, shown
from ..errors import RerouteError
from .waste import Waste

__all__ = ["GraphUse", "Graphs"]


@dataclass(frozen=True)
class Graphs:
    """How many CUDA graphs of prefills are held, and for which prompts (``reroute.enable(…, graphs=…)``).

    - ``max_graphs``: of one model; the one that was not used for longest leaves.
    - ``max_waste``: modelled time that fillers may add, as a share of what the prompt itself takes. Prompts that no
      graph serves for less run eagerly.

    Raises:
        RerouteError: no count from 1 on, no share from 0 on.
    """

    max_graphs: int = 16
    max_waste: float = 0.1

    def __post_init__(self) -> None:
        """Check them."""
        if not is_count(self.max_graphs):
            raise RerouteError(f"max_graphs must be a number of graphs from 1 on, not {shown(self.max_graphs)}.")
        try:
            is_share = finite(self.max_waste) >= 0
        except (TypeError, ValueError, OverflowError):
            is_share = False
        if not is_share:
            raise RerouteError("max_waste must be a share of a prompt's time from 0 on, such as 0.1.")


@dataclass(frozen=True)
class GraphUse:
    """Whether a prefill was replayed (``Stats.graph``).

    - ``why``: of one that ran eagerly, the reason; empty if it was replayed.
    - ``waste``: of one that was replayed, what fillers cost; its seconds are modelled.
    - ``graphs``: how many the model has, and ``nbytes``: what those of its device hold together: inputs and outputs,
      and the memory that captures have reserved.
    """

    why: str = ""
    waste: Waste | None = None
    graphs: int = 0
    nbytes: int = 0

    @property
    def is_replayed(self) -> bool:
        """Whether it was."""
        return self.waste is not None

    def __str__(self) -> str:
        """A line for people."""
        held = f"; graphs: {self.graphs}, {self.nbytes / 2**20:.4g} MiB on their device"
        if self.waste is None:
            return f"ran eagerly: {self.why}{held}"
        more = f"{self.waste.seconds:.1%} more time (modelled) and {self.waste.flops:.1%} more FLOPs"
        return f"replayed a graph, with {more} for fillers{held}"
