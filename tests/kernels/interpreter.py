"""Repairs to Triton's interpreter, which keeps bfloat16 as uint16 bit patterns and computes with those.

Upstream does not support bfloat16 arithmetic there: sums, comparisons and dots of bit patterns are wrong
without an error, and stores truncate. After ``repair`` they are what PyTorch computes: fp32, rounded to even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, TensorHandle


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bit patterns to fp32."""
    return (np.asarray(bits, np.uint16).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 to bfloat16 bit patterns, ties to even, NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


def floats(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def in_fp32(operation: Callable[..., Any]) -> Callable[..., Any]:
    """Run a builder method on fp32 where any operand is bfloat16, and round what comes out."""

    def run(self: Any, *operands: Any) -> Any:
        handles = [o for o in operands if isinstance(o, TensorHandle)]
        out = operation(self, *(floats(o) if isinstance(o, TensorHandle) else o for o in operands))
        if any(map(is_bf16, handles)) and is_bf16(handles[-1]) and out.data.dtype != bool:  # not a comparison
            return TensorHandle(narrow(out.data), tl.bfloat16)
        return out

    return run


def cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, source: Any, target: Any, *rounding: Any) -> Any:
        source = floats(source)
        if target.scalar == tl.bfloat16:
            return TensorHandle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        # A cast between equal types is what is left of bfloat16 -> fp32.
        return source if source.dtype.scalar == target.scalar else original(self, source, target, *rounding)

    return run


def reduce(original: Callable[..., Any]) -> Callable[..., Any]:
    def run(self: Any, operands: Any) -> Any:
        first = operands[0]
        if self.combine_fn is tl.standard._xor_combine:  # what tl.sort is made of: a Python loop upstream
            data = np.bitwise_xor.reduce(first.handle.data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(data, first.dtype)
        if not is_bf16(first.handle):
            return original(self, operands)
        out = original(self, (self.to_tensor(widen(first.handle.data), tl.float32), *operands[1:]))
        best, *rest = out if isinstance(out, (tuple, list)) else [out]
        kind = tl.block_type(tl.bfloat16, best.shape) if best.type.is_block() else tl.bfloat16
        best = tl.tensor(TensorHandle(narrow(best.handle.data), tl.bfloat16), kind)
        return (best, *rest) if rest else best

    return run


def index(original: Callable[..., None]) -> Callable[..., None]:
    """Triton 3.6 asks an array of one dimension for an integer, which NumPy refuses since 2.4."""

    def run(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return run


def repair() -> None:
    """Patch the interpreter of this process."""
    for name in ("binary_op", "create_dot", "create_fma"):
        setattr(InterpreterBuilder, name, in_fp32(getattr(InterpreterBuilder, name)))
    for name in ("cast_impl", "create_fp_to_fp"):
        setattr(InterpreterBuilder, name, cast(getattr(InterpreterBuilder, name)))
    ReduceOps.apply_impl = reduce(ReduceOps.apply_impl)
    interpreter._patch_lang_tensor = index(interpreter._patch_lang_tensor)
