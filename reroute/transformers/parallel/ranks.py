"""Tensor parallelism: each process has a part of the heads of a layer, and all of them keep the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reroute_kernels import AttentionSpec, Backend, RopeTables, Selection, SelectRows

from ...errors import RerouteError, UnsupportedModelError

__all__ = ["HeadRanks", "check_heads", "head_ranks"]

MESH = "tp"
"""What Transformers calls the dimension of its device mesh along which tensors are sharded."""


class HeadRanks:
    """The processes of a tensor-parallel group, ``size`` of them. All of them make the same calls in the same order.

    Collectives are as many bytes as a decision has scores and indices: keys stay where they are, but for rankers that
    ask for all of them. None waits for the device.
    """

    def __init__(self, group: Any) -> None:
        """``group``: a process group of ``torch.distributed``."""
        self.group, self.size = group, dist.get_world_size(group)

    def check(self, index: int, heads: int, kv_heads: int) -> None:
        """Check that layer ``index`` can be split into parts of whole heads.

        Raises:
            UnsupportedModelError: processes would have different numbers of them.
        """
        if heads % self.size or kv_heads % self.size:
            raise UnsupportedModelError(
                f"Decoder layer {index} has {heads} query and {kv_heads} key/value heads, which {self.size} processes "
                "of tensor parallelism cannot share evenly. Load the model with a tp_size that divides both."
            )

    def gather(self, heads: Tensor, total: int) -> Tensor:
        """All ``total`` heads (N, H, D), in the order of ranks, of the ``heads`` (N, H / size, D) of each."""
        if heads.shape[1] == total:  # some models gather them themselves, as for a norm of all of them
            return heads
        return self._gathered(heads).transpose(0, 1).flatten(1, 2)

    def agreeing(self, backend: Backend) -> Backend:
        """``backend``, whose selections are the same in all processes, whatever the last bits of what each ranks.

        ``score_topk`` takes the heads of the process and ranks by the mean over those of all, summed in the order of
        ranks. Where the process has all heads already the mean is the same. The others choose as the first process.
        """

        def score_topk(
            query: Tensor, keys: Tensor, tables: RopeTables, rows: SelectRows, spec: AttentionSpec
        ) -> Selection:
            own = backend.score_topk(query, keys, tables, rows, spec)
            return backend.select(self._mean(own.scores), rows)

        return replace(
            backend,
            select=self._as_first(backend.select),
            score_topk=score_topk,
            diverse_topk=self._as_first(backend.diverse_topk),
        )

    def _mean(self, scores: Tensor) -> Tensor:
        """Of ``scores`` (B, N) fp32, each process' mean over as many heads, to the same bits in all processes."""
        total: Tensor = reduce(torch.add, self._gathered(scores))
        return total / self.size

    def _as_first(self, select: Callable[[Tensor, SelectRows], Selection]) -> Callable[[Tensor, SelectRows], Selection]:
        def selected(ranked: Tensor, rows: SelectRows) -> Selection:
            *choices, scores = select(ranked, rows)
            flat = torch.cat([choice.flatten() for choice in choices])
            dist.broadcast(flat, group=self.group, group_src=0)
            parts = flat.split([choice.numel() for choice in choices])
            parts = (part.view_as(choice) for part, choice in zip(parts, choices, strict=True))
            return Selection(*parts, scores)  # type: ignore[call-arg]  # four parts

        return selected

    def _gathered(self, own: Tensor) -> Tensor:
        """(size, …): ``own`` (…) of each process."""
        every = own.new_empty(self.size, *own.shape)
        dist.all_gather(list(every), own.contiguous(), group=self.group)
        return every


def head_ranks(model: Any) -> HeadRanks | None:
    """Those that ``model`` is spread over; None if this process has all of it.

    Raises:
        UnsupportedModelError: they are not known, or have different rows or layers of it.
    """
    distributed = getattr(getattr(model, "config", None), "distributed_config", None)
    if (getattr(distributed, "pp_size", 1) or 1) > 1:
        raise UnsupportedModelError(
            f"{type(model).__name__} is loaded with pipeline parallelism: each process has a part of the layers, and "
            "routing needs all of them. Load it with tp_plan or device_map instead."
        )
    if (getattr(model, "tp_size", None) or 1) == 1:
        return None
    by_rows = sorted({name for name, style in (model.tp_plan or {}).items() if style == "sequence_parallel"})
    if by_rows:
        raise UnsupportedModelError(
            f"The tp_plan of {type(model).__name__} splits the rows of the prompt among processes ({by_rows[0]}: "
            "sequence_parallel), and routing ranks all of them. Use the plan of the model: tp_plan='auto'."
        )
    return HeadRanks(_group(model))


def _group(model: Any) -> Any:
    from torch.distributed.tensor import DTensor

    meshes = (weight.device_mesh for weight in model.parameters() if isinstance(weight, DTensor))
    # Older releases give a mesh of one dimension no name.
    mesh = next((mesh for mesh in meshes if MESH in (mesh.mesh_dim_names or (MESH,) * (mesh.ndim == 1))), None)
    if mesh is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has a tp_size of {model.tp_size}, and none of its weights says which processes "
            "share them. Load it with from_pretrained(tp_plan='auto'), not quantised."
        )
    return mesh.get_group(MESH if mesh.mesh_dim_names else None)


def check_heads(ranks: HeadRanks | None, index: int, found: tuple[int, int], total: tuple[int, int]) -> None:
    """Check that ``found`` query and key heads of layer ``index`` are all of its ``total``, or one process' part.

    Raises:
        RerouteError: they are neither.
    """
    size = 1 if ranks is None else ranks.size
    if found != total and found != (total[0] // size, total[1] // size):
        raise RerouteError(
            f"The projections of decoder layer {index} return {found[0]} query and {found[1]} key heads, and its "
            f"attention has {total[0]} and {total[1]}: they are spread over processes in another way than is known. "
            "Load the model with from_pretrained(tp_plan='auto'), or disable routing."
        )
