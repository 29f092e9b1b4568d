"""Record what the plain model attends to: what the ``Oracle`` method ranks by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .api import enable, handle_of
from .core.schedule import Schedule
from .errors import RerouteError
from .rankers.dense_attention import AttentionRecorder, DenseAttention
from .transformers import adapter_of

__all__ = ["record_attention"]


@torch.no_grad()
def record_attention(model: nn.Module, inputs: Mapping[str, Any]) -> DenseAttention:
    """Run a plain forward of ``model(**inputs)``, and keep what its last prompt tokens attend to in every layer.

    Every layer is the plain model's but the last, which has been recorded when it runs; the output is dropped.

    Raises:
        RerouteError: the model is routed already or cannot be, or there are no visual tokens in ``inputs``.
    """
    if handle_of(model) is not None:
        raise RerouteError("The model is routed: record its attention before reroute.enable, or after handle.disable.")
    recorder, last = AttentionRecorder(), len(adapter_of(model).layers) - 1
    with enable(model, schedule=Schedule((last,), (0.0,), (recorder,))):
        model(**{**inputs, "use_cache": False})
    if recorder.record is None:
        raise RerouteError("No attention was recorded: the prompts have no visual tokens.")
    return recorder.record
