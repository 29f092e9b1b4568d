"""Models and prompts of real sizes, how they are captured, and what is read off a profiler."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch._C._autograd import DeviceType
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import import_utils

import reroute_kernels
from bench.end_to_end.memory_log import LiveBytes
from bench.gpu_check import shapes
from bench.gpu_check.capture import captured_prefill
from bench.gpu_check.lines import MODEL_NAMES
from bench.gpu_check.profiler import OURS, kernel_times
from bench.gpu_check.shapes import SHAPES, Prompt, build, fitting, memory_of_prefill, memory_of_weights
from reroute.core.cost import ModelShape
from reroute_kernels.testing.cases import TEXT

CPU = torch.device("cpu")


@pytest.mark.parametrize("model", MODEL_NAMES)
def test_models_have_their_shapes(model: str) -> None:
    with FakeTensorMode():
        network = build(model, SHAPES[model], CPU, torch.bfloat16)
    assert ModelShape.from_config(network.config.get_text_config()) == SHAPES[model]
    parameters = [*network.model.language_model.parameters(), *network.lm_head.parameters()]
    assert sum(p.nbytes for p in parameters) == pytest.approx(memory_of_weights(SHAPES[model], 2), rel=0.01)
    assert {p.dtype for p in parameters} == {torch.bfloat16}


@pytest.mark.parametrize("model", ["llava-7b", "qwen-7b"])
def test_memory_is_foreseen(model: str) -> None:
    """Not less than it takes, and little more."""
    shape = replace(SHAPES[model], num_layers=4)
    with FakeTensorMode(), torch.no_grad():
        network = build(model, shape, CPU, torch.bfloat16)
        prompt, live = Prompt(network, 576, 8, CPU), LiveBytes()
        with live:
            network(**prompt.given)
    taken = max(live.timeline())
    assert taken <= memory_of_prefill(shape, [576 + TEXT] * shape.num_layers, 8, 2) < 1.2 * taken


def test_layers_that_fit() -> None:
    large = SHAPES["qwen-32b"]
    assert fitting(large, 78 << 30, 2) == large
    fewer = fitting(large, 40 << 30, 2)
    assert 20 < fewer.num_layers < 64
    assert memory_of_weights(fewer, 2) + shapes.ROOM <= 40 << 30
    assert fitting(large, 1, 2).num_layers == 1


@pytest.mark.parametrize("model", ["tiny-llava", "tiny-qwen"])
def test_a_capture_makes_no_mask_of_its_own(model: str) -> None:
    """Transformers 5.17 makes one while a stream is captured, so that a graph is not what runs eagerly."""
    network = build(model, SHAPES[model], CPU, torch.float32)
    prompt, masks = Prompt(network, 36, 1, CPU), []
    for layer in network.model.language_model.layers:
        see = lambda module, args, kwargs: masks.append(kwargs["attention_mask"])
        layer.register_forward_pre_hook(see, with_kwargs=True)
    with (
        torch.no_grad(),
        mock.patch.object(import_utils, "is_cuda_stream_capturing", return_value=True),
        mock.patch("bench.gpu_check.capture.captured", lambda run: run()),
    ):
        captured_prefill(lambda: network(**prompt.given))
    assert masks == [None] * SHAPES[model].num_layers


# --- kernels ----------------------------------------------------------------------------------------------------------


def event(name: str, microseconds: float, device: Any = DeviceType.CUDA) -> Any:
    return SimpleNamespace(name=name, device_type=device, time_range=mock.Mock(elapsed_us=lambda: microseconds))


def test_kernel_times() -> None:
    events = [
        event("_score_kernel", 5.0),
        event("_score_kernel", 7.0),
        event("_defer_kernel", 2.0),
        event("_defer_rmsnorm_kernel", 6.0),
        event("gemm<" + 200 * "x", 60.0),
        event("aten::mm", 999.0, DeviceType.CPU),
    ]
    times = kernel_times(events)
    assert (times["device_us"], times["launches"], times["share"]) == (80.0, 5, 0.25)
    assert times["kernels"] == {
        "_defer_rmsnorm_kernel": {"launches": 1, "median_us": 6.0, "sum_us": 6.0},
        "_score_kernel": {"launches": 2, "median_us": 6.0, "sum_us": 12.0},
        "_defer_kernel": {"launches": 1, "median_us": 2.0, "sum_us": 2.0},
    }
    (name, largest), *rest = times["largest"].items()
    assert (len(name), largest["sum_us"], rest) == (80, 60.0, [])
    assert "saw nothing" in kernel_times([event("aten::mm", 999.0, DeviceType.CPU)])["skipped"]


def test_our_kernels_have_these_names() -> None:
    folder = Path(reroute_kernels.__file__).parent / "triton_kernels"
    sources = "".join(file.read_text() for file in folder.glob("*.py"))
    assert {*re.findall(r"^def (_\w+_kernel)\(", sources, re.MULTILINE)} == {*OURS}
