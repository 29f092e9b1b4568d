"""Attention of a model by its name: kernels that run here stand in for flash attention, uncompiled code for flex."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

FLASH, HUB, FLEX = "flash_attention_2", "kernels-community/flash-attn2", "flex_attention"


@contextmanager
def attention_of(tiny: Any, name: str) -> Iterator[None]:
    """Let the decoder of ``tiny.model`` attend by the implementation ``name``."""
    with pytest.MonkeyPatch.context() as patch:
        if name in (FLASH, HUB):
            _flash_on_cpu(patch)
        if name == FLEX:
            _flex_without_compiler(patch)
        patch.setattr(tiny.model.config.get_text_config(), "_attn_implementation", name)
        yield


def _flex_without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What flex attention says it does, operation by operation, instead of a kernel for every shape."""
    import torch.nn.attention.flex_attention as flex
    from transformers import masking_utils as masks
    from transformers.integrations import flex_attention as theirs

    def attend(*args: Any, training: bool = False, **kwargs: Any) -> Any:
        return flex.flex_attention(*args, **kwargs)

    def mask(*args: Any, _compile: bool = False, **kwargs: Any) -> Any:
        return flex.create_block_mask(*args, **kwargs)

    monkeypatch.setattr(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)  # else Dynamo traces each call anew
    monkeypatch.setattr(theirs, "compile_friendly_flex_attention", attend)
    monkeypatch.setattr(masks, "create_block_mask", mask)


def _flash_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give Transformers' flash path (2-D masks, unpadding, packing by position ids) kernels that run here.

    Both are causal with the last query on the last key, as flash attention is. They go by two names: the usual one,
    and the one that Transformers registers for kernels from the hub.
    """
    from transformers import modeling_flash_attention_utils as flash
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as FUNCTIONS

    for functions in (MASKS, FUNCTIONS):
        monkeypatch.setitem(functions._global_mapping, HUB, functions[FLASH])

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, softmax_scale: float | None = None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        new, old = q.shape[2], k.shape[2] - q.shape[2]
        visible = torch.ones(new, old + new, dtype=torch.bool).tril(old) if causal else None
        return F.scaled_dot_product_attention(q, k, v, visible, scale=softmax_scale).transpose(1, 2)

    def varlen(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        causal: bool = False,
        softmax_scale: float | None = None,
    ) -> Tensor:
        ends = zip(cu_seqlens_q.tolist()[1:], cu_seqlens_k.tolist()[1:], strict=True)
        done, out = (0, 0), []
        for end in ends:
            mine, theirs = slice(done[0], end[0]), slice(done[1], end[1])
            out.append(dense(q[None, mine], k[None, theirs], v[None, theirs], causal, softmax_scale)[0])
            done = end
        return torch.cat(out)

    kernels = (dense, varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: kernels)
    monkeypatch.setattr(flash, "_loaded_implementation", None)
