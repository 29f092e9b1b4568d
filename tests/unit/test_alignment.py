"""Copies from the rows of a class to those of a prompt: the same for any dtype and width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reroute import Schedule
from reroute.core.plan import plan_tokens
from reroute.graphs import Alignment

CPU = torch.device("cpu")
LENGTH, CAPACITY = 9, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8])
@pytest.mark.parametrize("width", [1, 3, 6, 8])
@pytest.mark.parametrize("padding", [(0,), (0, 2), (3, 0)])
def test_copies(dtype: torch.dtype, width: int, padding: tuple[int, ...]) -> None:
    """Elements are copied several at a time where they fit. Padding comes first, and fillers behind all rows."""
    valid = np.arange(LENGTH) >= np.array(padding)[:, None]
    is_visual = np.zeros_like(valid)
    is_visual[:, 4:7] = True
    plan = plan_tokens(is_visual, valid, Schedule((1,), (0.5,)), "route")
    assert plan is not None
    alignment = Alignment(plan, 1, CPU)
    buffer = torch.randint(-100, 100, (2, len(padding), 3, CAPACITY, width)).to(dtype)
    for stage, columns in ((-1, LENGTH), (0, plan.width(0))):
        for states in (alignment.states(stage, buffer), alignment.to_copy(stage, buffer)):
            assert (states.shape, states.dtype) == ((2, len(padding), 3, columns, width), dtype)
            for sample, count in enumerate(plan.lengths if stage < 0 else plan.active(stage)):
                assert torch.equal(states[:, sample, :, columns - count :], buffer[:, sample, :, :count])
    hidden = alignment.hidden(buffer[0, :, 0])
    for sample, count in enumerate(plan.lengths):
        assert torch.equal(hidden[sample, LENGTH - count :], buffer[0, sample, 0, :count])
        assert not hidden[sample, : LENGTH - count].any()
