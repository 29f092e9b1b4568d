"""What others lay over projections, adapters of PEFT and weights that accelerate loads: right, or refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from changes import check, decoder, prompt, refused
from models import Tiny
from oracle import predict
from support import FEW, close, enable
from torch import nn

from reroute.errors import UnsupportedModelError


def hand_over(module: nn.Module, args: Any, kwargs: Any, **named: Any) -> Any:
    """As PEFT's hooks: what they are made with goes on to the adapter, which pops it from its arguments."""
    return args, kwargs


def with_hooks(layers: Any, paths: tuple[str, ...], **named: Any) -> list[Any]:
    parts = [layer.get_submodule(path) for layer in layers for path in paths]
    hook = functools.partial(hand_over, **named)
    return [part.register_forward_pre_hook(hook, with_kwargs=True) for part in parts]


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.k_proj", "input_layernorm"])
def test_an_adapter_for_each_row(own: Tiny, path: str) -> None:
    """PEFT's ``adapter_names``: they count rows of the batch, and ranking has one row for each token."""
    with refused(own, rf"an adapter for each row of the batch \(adapter_names\) at '{path}'"):
        hooks = with_hooks(decoder(own).layers, (path,), adapter_names=["one", "two"])
    with enable(own, FEW) as handle:
        for hook in hooks:
            hook.remove()
        check(own, handle)


def test_an_adapter_for_each_row_elsewhere(own: Tiny) -> None:
    """Where nothing is ranked, rows stay rows."""
    with_hooks(decoder(own).layers, ("self_attn.v_proj", "mlp.up_proj"), adapter_names=["one"])
    with_hooks([decoder(own).layers[i] for i in (0, 2, 4)], ("self_attn.q_proj",), adapter_names=["one"])
    with enable(own, FEW) as handle:
        check(own, handle)


@pytest.mark.parametrize("path", ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_activated_lora(own: Tiny, path: str) -> None:
    """Its offsets count from the end of the logical row, padding included, wherever it is."""
    with refused(own, r"Activated LoRA counts its tokens .*\(alora_offsets\)"):
        with_hooks(decoder(own).layers, (path,), alora_offsets=[4])


@pytest.mark.parametrize("when", ["before enable", "after enable"])
def test_weights_that_come_with_whole_layers(own: Tiny, when: str) -> None:
    """accelerate's ``preload_module_classes``; weights that come when they are used are fine (test_offloaded)."""
    accelerate = pytest.importorskip("accelerate")
    sample = prompt(own)
    expected = predict(own, sample, FEW)
    kind = [type(decoder(own).layers[0]).__name__]

    def offload() -> None:
        accelerate.cpu_offload(own.model, execution_device=torch.device("cpu"), preload_module_classes=kind)

    if when == "before enable":
        offload()
    with enable(own, FEW) as handle:
        if when == "after enable":
            close(own.model(**own.inputs([sample])).logits[0], expected.logits)
            offload()
        before = handle.totals().prefills
        with pytest.raises(
            UnsupportedModelError, match=r"'input_layernorm' of decoder layer 1 .*preload_module_classes"
        ):
            own.model(**own.inputs([sample]))
        assert handle.totals().prefills == before
    own.model(**own.inputs([sample]))
    accelerate.hooks.remove_hook_from_submodules(own.model)
