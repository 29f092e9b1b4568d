"""Types of models, each spread over two processes by the tensor parallelism that it has itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from dense import near
from test_types import ONE, TWO, batch, run
from tiny_types import build

import reroute
from reroute.rankers import LastTokenAttention
from reroute.transformers.adapters import adapter_of

KINDS = (
    "aria",
    "aya_vision",
    "deepseek_vl",
    "ernie4_5_vl_moe",
    "exaone4_5",
    "gemma3",
    "glm4v",
    "glm4v_moe",
    "internvl",
    "kimi_k25",
    "mistral3",
    "paligemma",
    "qwen2_vl",
    "qwen3_5",
    "smolvlm",
)
"""With sliding layers, states, norms of heads, latent keys, experts, and none of these."""


@torch.no_grad()
def check(kind: str, folder: Path) -> None:
    """Selections, logits and a step are those of one process."""
    one = build(kind, "sdpa")
    if dist.get_rank() == 0:
        one.model.save_pretrained(folder / kind)
    dist.barrier()
    model = type(one.model).from_pretrained(
        folder / kind, tp_plan="auto", dtype=torch.float32, attn_implementation="sdpa"
    )
    two = replace(one, model=model.eval().requires_grad_(False))
    near(
        two.model(**batch(two, ONE, TWO), use_cache=False).logits,
        one.model(**batch(one, ONE, TWO), use_cache=False).logits,
    )
    adapter = adapter_of(two.model)
    layers = [index for index in range(1, 6) if adapter.may_decide(index, LastTokenAttention())][-3:]
    schedule = reroute.Schedule(tuple(layers), (0.6, 0.3, 0.5)[: len(layers)])
    kept, outputs = [], []
    for tiny in (one, two):
        with reroute.enable(tiny.model, schedule=schedule, trace=True) as handle:
            outputs.append(run(handle, tiny, ONE, TWO))
        assert handle.trace is not None
        kept.append([[rows.tolist() for rows in stage.kept] for stage in handle.trace])
    assert kept[0] == kept[1]
    for expected, got in zip(*outputs, strict=True):
        near(got, expected)


CHECKS: dict[str, Callable[[Path], None]] = {kind: functools.partial(check, kind) for kind in KINDS}
