"""Weights that accelerate keeps elsewhere until their module runs: routed to the bit as when they are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from changes import decoder
from models import Sample, Tiny
from support import FEW, close, enable, generate

Offload = Callable[[Any, Path], Any]


def _to_cpu(model: Any, _: Path) -> Any:
    return pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")


def _to_disk(model: Any, folder: Path) -> Any:
    return pytest.importorskip("accelerate").disk_offload(model, folder, execution_device=torch.device("cpu"))


def device_map(model: Any) -> dict[str, str]:
    """Layers 1, which decides, and 2 are on disk, and all else in place."""
    base, text = model.model, model.model.language_model
    others = (f"model.{name}" for name, child in base.named_children() if child is not text)
    inner = (f"model.language_model.{name}" for name, _ in text.named_children() if name != "layers")
    layers = {f"model.language_model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(len(text.layers))}
    return {**dict.fromkeys(("lm_head", *others, *inner), "cpu"), **layers}


def _by_a_map(model: Any, folder: Path) -> Any:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.dispatch_model(model, device_map(model), main_device="cpu", offload_dir=folder, force_hooks=True)


KINDS: dict[str, Offload] = {"cpu": _to_cpu, "disk": _to_disk, "device_map": _by_a_map}


def samples_of(tiny: Tiny) -> list[Sample]:
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)]


def same(got: Any, expected: Any) -> None:
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))


@pytest.mark.parametrize(("order", "action"), [("before enable", "route"), ("after enable", "remove")])
@pytest.mark.parametrize(("kind", "family"), [("cpu", "llava"), ("disk", "qwen"), ("device_map", "llava")])
def test_offloaded(kind: str, family: str, order: str, action: Any, tmp_path: Path) -> None:
    own = getattr(models, family)(layers=5)
    rules, samples = replace(FEW, action=action), samples_of(own)
    plain = generate(own, samples, 3)
    with enable(own, rules):
        routed = generate(own, samples, 3)
    if order == "before enable":
        KINDS[kind](own.model, tmp_path)
    with enable(own, rules) as handle:
        if order == "after enable":
            same(generate(own, samples, 3), routed)
            KINDS[kind](own.model, tmp_path)
        assert decoder(own).layers[1].self_attn.k_proj.weight.is_meta
        same(generate(own, samples, 3), routed)
        assert handle.stats().backend == "torch"
    same(generate(own, samples, 3), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_brought_back_while_routed(kind: str, tmp_path: Path) -> None:
    own = models.llava(layers=5)
    samples = samples_of(own)
    with enable(own, FEW):
        routed = generate(own, samples, 2)
        KINDS[kind](own.model, tmp_path)
        same(generate(own, samples, 2), routed)
        pytest.importorskip("accelerate.hooks").remove_hook_from_submodules(own.model)
        assert not decoder(own).layers[1].self_attn.k_proj.weight.is_meta
        same(generate(own, samples, 2), routed)


def test_loaded_with_a_device_map(tmp_path: Path) -> None:
    """``from_pretrained``, which leaves layers in the checkpoint or puts them into ``offload_folder``."""
    pytest.importorskip("accelerate")
    own = models.qwen(layers=5)
    samples, kind = samples_of(own), type(own.model)
    with enable(own, FEW):
        routed = generate(own, samples, 2)
    own.model.save_pretrained(tmp_path / "model")
    loaded = kind.from_pretrained(
        tmp_path / "model", device_map=device_map(own.model), offload_folder=tmp_path / "folder", dtype=torch.float32
    )
    tiny = replace(own, model=loaded.eval())
    assert decoder(tiny).layers[1].self_attn.k_proj.weight.is_meta
    tiny.model.generation_config = own.model.generation_config
    with enable(tiny, FEW), torch.no_grad():
        got = generate(tiny, samples, 2)
    assert torch.equal(got.sequences, routed.sequences)
    # Weights that are mapped from a file lie at other addresses, and last bits of products differ, routed or not.
    close(torch.stack(got.logits), torch.stack(routed.logits))
