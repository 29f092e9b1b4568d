"""What a decision needs of the model, and what a ranker gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch

from reroute_kernels import AttentionSpec, Backend, RMSNorm, RopeTables, Selection, SelectRows

from ..checks import shown
from ..errors import RerouteError
from .vision import UNSEEN, Vision

if TYPE_CHECKING:
    from ..core.cost import ModelShape
    from ..core.decision import Decision
    from .vision import TowerShape

__all__ = ["DecoderAdapter", "Merge", "RankContext", "Ranker", "check_ranker"]


class DecoderAdapter(Protocol):
    """What scoring needs from the model."""

    def input_norm(self, layer: int) -> RMSNorm | None:
        """The norm of rows before the attention of ``layer``, or None if there is more to it than its formula."""

    def normalise(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (R, C) after that norm, by the model itself."""

    def final_norm(self, rows: torch.Tensor) -> torch.Tensor:
        """``rows`` (R, C) after the norm behind the last layer."""

    def check_final_norm(self) -> None:
        """RerouteError if ``final_norm`` cannot be called while layers run."""

    def project(self, layer: int, normed: torch.Tensor, tables: RopeTables) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (B, H, D) of ``normed[tables.query_rows]`` and keys (R, G, D) of ``normed`` (R, C), before RoPE.

        Queries come after the layer's query norm, keys before its key norm. ``tables`` are those by which both are
        rotated then. Under tensor parallelism the heads of all processes are brought together.
        """

    def project_own(self, layer: int, normed: torch.Tensor, tables: RopeTables) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the heads that this process has: what ``RankContext.backend`` scores by in all of them."""

    def agreeing(self, backend: Backend) -> Backend:
        """``backend`` with selections that all processes share among which the model is spread."""

    def key_weights(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights (G, D, C) and bias (G, D), if there is one, with which ``project`` makes keys of ``layer``.

        Raises:
            RerouteError: keys of ``layer`` are not made by one matrix alone.
        """

    def attention_spec(self, layer: int) -> AttentionSpec:
        """Scale, rotation and key norm of the attention of ``layer``."""

    def rotates(self, layer: int) -> bool:
        """Whether the attention of ``layer`` rotates queries and keys by their positions at all."""

    def rope_tables(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin (B, S, rot) at position ids (B, S), for layers of full attention."""


class RankContext(NamedTuple):
    """What a ranker may use at one decision. Hidden states are computed only if it asks for them, once.

    - ``backend``: selects alike in all processes of tensor parallelism; ``score_topk`` ranks by the heads of all.
    - ``tables``: of the R scored rows; the last prompt token of each sample is its query. They turn nothing if the
      layer does not.
    - ``rows``: what competes.
    - ``visual_indices`` (B, N): which of its sample's visual tokens each candidate is.
    - ``hidden()`` (R, C): latest hidden states of the scored rows, on the device of the index tensors.
    - ``normed()`` (R, C): the same after the input norm of ``decision.score_layer``, on the device of that layer.
    - ``questions``: of each sample, how many of the last rows that its query sees come after all visual tokens.
    - ``vision``: the pictures, for rankers that need them; others are refused what they ask of it.
    - ``notes``: what the ranker noted earlier in this prefill, by the layer before which it did (``Ranker.note``).
    """

    decision: Decision
    backend: Backend
    adapter: DecoderAdapter
    tables: RopeTables
    rows: SelectRows
    visual_indices: torch.Tensor
    hidden: Callable[[], torch.Tensor]
    normed: Callable[[], torch.Tensor]
    questions: tuple[int, ...] = ()
    vision: Vision = UNSEEN
    notes: Mapping[int, Any] = MappingProxyType({})

    def candidates_of(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Of each sample, those of ``states`` (R, …) that are its candidates', (N_b, …) in prompt order."""
        return self._of(states, self.rows.candidates, self.rows.metadata.num_candidates)

    def texts_of(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Of each sample, those of ``states`` (R, …) that are its text tokens', (M_b, …) in prompt order."""
        return self._of(states, self.rows.text_rows, self.rows.metadata.num_texts)

    def questions_of(self, states: torch.Tensor) -> list[torch.Tensor]:
        """Of each sample, those of ``states`` (R, …) that come after all visual tokens, up to its query."""
        counts = self.rows.metadata
        ends = [start + length for start, length in zip(counts.starts, counts.kv_lens, strict=True)]
        return [states[end - n : end].clone() for end, n in zip(ends, self.questions, strict=True)]

    def best(self, scores: Iterable[torch.Tensor]) -> Selection:
        """The candidates of the highest ``scores``, (N_b,) for each sample; of equal ones the first."""
        padded = torch.full_like(self.rows.candidates, -torch.inf, dtype=torch.float32)
        for target, score, n in zip(padded, scores, self.rows.metadata.num_candidates, strict=True):
            target[:n] = score
        return self.backend.select(padded, self.rows)

    def _of(self, states: torch.Tensor, rows: torch.Tensor, counts: tuple[int, ...]) -> list[torch.Tensor]:
        starts = self.rows.metadata.starts
        return [states[start + its[:n]] for start, its, n in zip(starts, rows, counts, strict=True)]


Merge = Callable[[torch.Tensor], torch.Tensor]
"""From the hidden states (R, C) of the rows that were ranked, as they are when the stage begins, to those (B, K, C)
with which its kept tokens go on, in the order of ``Selection.kept``; what stands where that is -1 is not read."""


class Ranker(ABC):
    """What orders the candidates of a decision; one object serves all decisions, samples and threads.

    - ``layer_offset``: 0 decides before the routing layer, -1 before the layer that comes before it.
    - ``needs_attention``: whether it asks a layer how that attends (``RankContext.normed``, ``adapter``, ``tables``
      but for ``query_rows``). Others may decide before any layer, also one with a window or a state.
    - ``needs_vision``: whether it looks at the pictures, as ``RankContext.vision`` shows them.
    """

    layer_offset: int = 0
    needs_attention: ClassVar[bool] = True
    needs_vision: ClassVar[bool] = False

    def tower_states(self, tower: TowerShape) -> Sequence[int]:
        """Which hidden states of the vision tower it reads, if it ``needs_vision``; no other is kept.

        As Transformers counts them: 0 is the input of the first layer, n the output of the last of n layers; from the
        end if negative. Attention and keys of a layer are computed from its input, which has the layer's number.
        """
        return ()

    def check(self, adapter: DecoderAdapter, layer: int) -> None:
        """Refuse a model that it cannot rank in, on the input of ``layer``: at ``enable``, and before a call runs.

        Raises:
            RerouteError: says why.
        """
        return

    def within_capacities(self, backend: Backend) -> bool:
        """Whether it selects by ``backend`` without counts on the host: ``SelectMetadata`` may then be capacities."""
        return False

    def looks_before(self, layer: int) -> Collection[int]:
        """The layers on whose input it makes a ``note``, ahead of its decision before ``layer`` and no later."""
        return ()

    def note(self, context: RankContext) -> Any:
        """What its decisions in this prefill, and no others, find in ``RankContext.notes``.

        Equal rankers share one note for each layer. ``context.decision.score_layer`` is that layer; ``candidates`` are
        what competes there, before a decision is made on the same input. Rules are those of ``select``; there are no
        pictures, and what ``hidden`` returns is written to later: note copies of it.
        """
        raise NotImplementedError(f"{type(self).__name__}.looks_before asks for notes, and there is no note().")

    def decide(self, context: RankContext) -> tuple[Selection, Merge | None]:
        """What ``select`` returns, and how the tokens that are kept take up others, if they do.

        Rules are those of ``select``. Merging runs when the stage begins; gradients pass there if they are recorded.
        """
        return self.select(context), None

    @abstractmethod
    def select(self, context: RankContext) -> Selection:
        """The ``decision.k`` best candidates of each sample. Asks for ``hidden`` or ``normed`` of ``context``, once.

        Runs under ``torch.no_grad()``, as a selection has no gradient. Must not wait for the device, and must not let a
        sample depend on its batch neighbours.
        """

    def flops(self, shape: ModelShape, rows: int, candidates: int, k: int) -> int:
        """FLOPs of keeping ``k`` of a sample's ``candidates``, among ``rows`` rows. 0: not known, so not counted."""
        return 0

    def note_flops(self, shape: ModelShape, rows: int, candidates: int) -> int:
        """FLOPs of one ``note`` on a sample's ``candidates``, among ``rows`` rows."""
        return 0


def check_ranker(value: object) -> None:
    """RerouteError unless ``value`` is a ranker."""
    if not isinstance(value, Ranker):
        raise RerouteError(
            f"A ranker must be a Ranker such as reroute.rankers.LastTokenAttention(), not {shown(value)}."
        )
