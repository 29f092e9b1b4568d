"""Weights that FSDP2 shards: a process has a part of each, and all of them only while the module runs."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from ...errors import UnsupportedModelError
from .ranks import HeadRanks

__all__ = ["check_tower", "check_unit", "check_unwrapped", "has_distributed_weights", "is_sharded", "unshard"]

_FSDP = "torch.distributed.fsdp"
"""Whoever shards has imported it, and to import it takes long."""


def check_unwrapped(model: Any) -> None:
    """Refuse a ``model`` that FSDP1 shards.

    Raises:
        UnsupportedModelError: what its wrapper takes says nothing of what the module in it takes.
    """
    fsdp = sys.modules.get(_FSDP)
    if fsdp is not None and any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is wrapped by FSDP1 (FullyShardedDataParallel), which hides what its layers take. "
            "Shard it with FSDP2: torch.distributed.fsdp.fully_shard."
        )


def unshard(layer: Any) -> None:
    """Gather the weights of a ``layer`` that is about to run and would do so as the next thing.

    So processes whose prompts are not routed gather as often and in the same order, and nobody waits for a call that
    does not come. The weights are sharded again when the layer has run.
    """
    if _is_unit(layer):
        layer.unshard()


def check_unit(what: str, part: Any, *around: Any) -> None:
    """Refuse a ``part`` that ranking calls, ``what``, if it or a module ``around`` it is sharded by itself.

    Raises:
        UnsupportedModelError: processes that do not rank would wait in another call.
    """
    if is_sharded(part) or any(map(_is_unit, around)):
        raise UnsupportedModelError(
            f"FSDP2 shards {what} by itself, and ranking needs it before other processes do, whose prompts have no "
            "picture. Call fully_shard on whole layers and on the model, or rank by what does not need it."
        )


def check_tower(parts: Iterable[Any], ranks: HeadRanks | None) -> None:
    """Refuse ``parts`` of a vision tower from which rankers could not compute once they have run.

    Raises:
        UnsupportedModelError: this process has only a part of their weights then.
    """
    for part in parts:
        if is_sharded(part) or (ranks is not None and has_distributed_weights(part)):
            raise UnsupportedModelError(
                f"A ranker of this schedule computes with the weights of {type(part).__name__}, which are spread over "
                "processes. Leave the vision tower out of fully_shard and of the tp_plan, or choose rankers that do "
                "not look at pictures."
            )


def is_sharded(module: Any) -> bool:
    """Whether FSDP2 shards ``module`` or a part of it by itself."""
    return _FSDP in sys.modules and any(map(_is_unit, module.modules()))


def has_distributed_weights(module: Any) -> bool:
    """Whether this process has only a part of some weight of ``module`` now."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and any(isinstance(weight, tensors.DTensor) for weight in module.parameters())


def _is_unit(module: Any) -> bool:
    fsdp = sys.modules.get(_FSDP)
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
