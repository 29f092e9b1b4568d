"""Decoders with quantised weights: torchao's and bitsandbytes', and stand-ins of the two forms that these have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import Tiny
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only


class Int8Weight(Tensor):
    """As torchao's: a tensor that says it is float and holds integers and scales; few operations know it."""

    qdata: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, qdata: Tensor, scale: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype, device=qdata.device)

    def __init__(self, qdata: Tensor, scale: Tensor) -> None:
        self.qdata, self.scale = qdata, scale

    @classmethod
    def of(cls, weight: Tensor) -> Int8Weight:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["qdata", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], _: Any, size: Any, stride: Any) -> Int8Weight:
        return Int8Weight(inner["qdata"], inner["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # PyTorch's own signature has no cls
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = function.overloadpacket.__name__
        if name in ("detach", "alias"):
            return cls(args[0].qdata, args[0].scale)
        if name not in ("t", "mm", "addmm", "linear"):
            raise NotImplementedError(f"{name} of quantised weights")
        plain = tree_map_only(cls, lambda weight: weight.qdata * weight.scale, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


class Linear8(nn.Module):
    """As bitsandbytes': a layer of its own, whose weight is packed to another shape and dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        quantised = Int8Weight.of(linear.weight)
        self.weight = nn.Parameter(quantised.qdata.view(torch.uint8).reshape(-1, 1), requires_grad=False)
        self._scale = quantised.scale

    def forward(self, rows: Tensor) -> Tensor:
        weight = self.weight.view(torch.int8).view(self.out_features, -1) * self._scale
        return nn.functional.linear(rows, weight.to(rows.dtype), self.bias)


def _stand_in_weights(text: nn.Module) -> None:
    for module in text.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Int8Weight.of(module.weight), requires_grad=False)


def _stand_in_layers(text: nn.Module) -> None:
    _replace(text, Linear8)


def _torchao(text: nn.Module) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    quantization.quantize_(text, quantization.Int8WeightOnlyConfig())


def _bitsandbytes(text: nn.Module) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

    def nf4(linear: nn.Linear) -> Any:
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, torch.float32, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4")
        layer.bias = linear.bias
        return layer.to("cpu")  # which quantises

    _replace(text, nf4)


def _replace(text: nn.Module, by: Callable[[nn.Linear], nn.Module]) -> None:
    for parent in list(text.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, by(child))


KINDS: dict[str, Callable[[nn.Module], None]] = {
    "stand-in of weights": _stand_in_weights,
    "stand-in of layers": _stand_in_layers,
    "torchao int8": _torchao,
    "bitsandbytes nf4": _bitsandbytes,
}
WEIGHTS = ("stand-in of weights", "torchao int8")
"""Those whose layers are plain ones, with a weight that holds other tensors."""


def quantise(tiny: Tiny, kind: str) -> Tiny:
    """The decoder of ``tiny`` in ``kind``; skips the test where the package is missing."""
    KINDS[kind](tiny.model.model.language_model)
    tiny.model(**tiny.inputs([tiny.prompt(0, 2, tiny.grid, 1)]))
    return tiny
