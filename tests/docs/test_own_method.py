"""The code of the guide to methods of one's own runs, block after block."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import models
import pytest
import torch

import reroute
from reroute.methods import METHODS

GUIDE = (Path(__file__).parents[2] / "docs/guides/own-method.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


@pytest.fixture
def _methods_as_before() -> Any:
    before = dict(METHODS)
    yield
    for name in set(METHODS) - set(before):
        del METHODS[name]


@pytest.mark.usefixtures("_methods_as_before")
def test_the_guide_runs() -> None:
    tiny = models.llava(layers=32)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    names: dict[str, Any] = {"model": tiny.model, "__name__": __name__}
    prefills = 0
    for block in BLOCKS:
        exec(compile(block, "own-method.md", "exec"), names)
        handle = reroute.handle_of(tiny.model)
        if handle is not None and "reroute.enable(model" in block:
            with torch.no_grad():
                tiny.model(**given)
            assert handle.stats().prefills == 1
            prefills += 1
    reroute.disable(tiny.model)
    assert prefills == 6
