"""What a method is: a schedule and a way to rank."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from typing import Self

    import torch

    from ..schedule import Action, Schedule

__all__ = ["Method", "ScoreView"]


@dataclass(frozen=True)
class ScoreView:
    """What a method may look at when it ranks the candidates of a decision.

    - ``hidden[b]`` (N_b, C): latest hidden states of sample ``b``'s candidates, in prompt order.
    - ``layer``: the layer whose input this is. ``stage``: the stage that is decided, from 0.
    - ``query`` (B, C): hidden state of each sample's last prompt token.
    """

    hidden: list[torch.Tensor]
    layer: int
    stage: int
    query: torch.Tensor


@dataclass(frozen=True)
class Method(ABC):
    """How visual tokens are ranked, and on what schedule.

    The default ranking, attention of the last prompt token averaged over heads, is a fused kernel.
    A method that ranks otherwise overrides ``score``. Any existing method is a good start::

        @dataclass(frozen=True)
        class Norm(FastV):
            name = "norm"

            def score(self, view: ScoreView) -> list[torch.Tensor]:
                return [hidden.float().norm(dim=-1) for hidden in view.hidden]

        reroute.enable(model, method=Norm(), keep=0.33)
    """

    name: ClassVar[str]
    uses_attention: ClassVar[bool] = True
    """Ranked by the fused kernel; becomes False in a class that overrides ``score``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Derive ``uses_attention``, so that an own ``score`` cannot be overlooked."""
        super().__init_subclass__(**kwargs)
        cls.uses_attention = cls.score is Method.score

    @abstractmethod
    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """The schedule for a model of ``num_layers`` decoder layers."""

    @abstractmethod
    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """This method with the ratios that give ``keep`` = avg_T / N, before rounding to counts.

        Raises:
            RerouteError: no ratios reach this budget; says which ones can be reached.
        """

    def score(self, view: ScoreView) -> list[torch.Tensor]:
        """Scores (N_b,) fp32 of each sample's candidates, the highest kept first. Other shapes are refused.

        Must not wait for the device, and must not let a sample depend on its batch neighbours.
        """
        raise NotImplementedError(f"{self.name} is ranked by attention, in the fused kernel")
