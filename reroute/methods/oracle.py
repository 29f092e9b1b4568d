"""Oracle: any method's schedule, ranked by what the plain model attends to later; a bound for research."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from ..checks import shown
from ..errors import RerouteError
from ..rankers import DenseAttention, RecordedAttention
from .base import Method
from .pdrop import PDrop

if TYPE_CHECKING:
    from typing import Self

    from ..core.schedule import Action, Schedule

__all__ = ["Oracle"]


@dataclass(frozen=True)
class Oracle(Method):
    """The schedule of ``like``, with the attention of the plain model as the score of every decision::

        record = reroute.record_attention(model, inputs)
        with reroute.enable(model, method=Oracle(record), keep=0.2):
            model.generate(**inputs)

    A decision goes by the mean attention of the last prompt token in all layers for which it is made: with ``route``
    those of its stage, with ``remove`` all from there on. No ranking in a single prefill can know it. It serves the
    prompts that were recorded; the plain prefill that recorded them is counted nowhere.
    """

    name = "oracle"

    record: DenseAttention
    like: Method = field(default=PDrop(), kw_only=True)

    def __post_init__(self) -> None:
        """Check the types."""
        if not isinstance(self.record, DenseAttention) or not isinstance(self.like, Method):
            raise RerouteError(
                "Oracle takes what reroute.record_attention(model, inputs) returned, and a method, such as "
                f"like=PDrop(); got {shown(self.record)}, like={shown(self.like)}."
            )

    def schedule(self, num_layers: int, action: Action) -> Schedule:
        """See ``Method``.

        Raises:
            RerouteError: a model of another depth was recorded.
        """
        if self.record.num_layers != num_layers:
            raise RerouteError(
                f"Attention was recorded in {self.record.num_layers} layers, and the model has {num_layers}. Record it "
                "with this model."
            )
        schedule = self.like.schedule(num_layers, action)
        stages = zip(pairwise((*schedule.layers, num_layers)), schedule.each_action(action), strict=True)
        ends = [(first, end if does == "route" else num_layers) for (first, end), does in stages]
        return replace(schedule, rankers=tuple(RecordedAttention(self.record, *span) for span in ends))

    def with_budget(self, keep: float, num_layers: int, action: Action) -> Self:
        """See ``Method``."""
        return replace(self, like=self.like.with_budget(keep, num_layers, action))
