"""Weights that FSDP2 shards: a process has a part of each, and all of them only while the module runs."""

from __future__ import annotations

import sys
from typing import Any

from ...errors import UnsupportedModelError

__all__ = ["check_unit", "is_sharded", "unshard"]


def unshard(*modules: Any) -> None:
    """Gather the weights of those ``modules`` that are sharded by themselves, from the outside in.

    They are about to run and would do so themselves, in the same order: processes whose prompts are not routed gather
    as often, and nobody waits for a call that does not come. They are sharded again when they have run.
    """
    for module in modules:
        if _is_unit(module):
            module.unshard()


def check_unit(part: Any, path: str, index: int) -> None:
    """Refuse a part at ``path`` of layer ``index`` that gathers its weights each time it is called.

    Raises:
        UnsupportedModelError: processes that do not call it to rank would wait in another call.
    """
    if any(map(_is_unit, part.modules())):
        raise UnsupportedModelError(
            f"FSDP2 shards {path!r} of decoder layer {index} by itself, and routing calls it once more than a process "
            "whose prompt has no picture. Call fully_shard on whole layers instead."
        )


def is_sharded(module: Any) -> bool:
    """Whether FSDP2 shards ``module`` or a part of it by itself."""
    return any(map(_is_unit, module.modules()))


def _is_unit(module: Any) -> bool:
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever shards has imported it, and it takes long
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
