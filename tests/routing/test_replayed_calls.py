"""What a replay asks the device for, and what a graph reads: counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import models
import pytest
from models import CACHE
from oracle import Rules
from replays import capture, replayed, route
from tape import Tape
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache

from reroute.transformers.graphs import Replays

FOUR = Rules((1, 3, 5, 7), (0.5, 0.4, 0.3, 0.2))
VIEWS = {"view", "expand", "split", "slice", "select", "unbind", "split_with_sizes", "_unsafe_view", "t", "transpose"}
UNQUEUED = {"empty", "empty_strided", "detach", "alias", "lift_fresh", "_to_copy", "resize_"}
"""Of the host: memory, and integers on their way to it."""


class Calls(TorchDispatchMode):
    """Counts operations that would be queued on a device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS | UNQUEUED:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """What prefills do in their turn."""
    calls, run = Calls(), Replays._in_turn

    def in_turn(self: Replays, *args: Any) -> Any:
        with calls:
            return run(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Replays, "_in_turn", in_turn)
        yield calls.names


@pytest.mark.parametrize("name", ["llava-gqa", "qwen"])
def test_eleven_calls_at_batch_one(name: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """One upload, two gathers, the graph, keys and values of five parts, columns, hidden states."""
    tiny = models.tiny(name)
    inputs = tiny.inputs([tiny.prompt(3, 9, tiny.grid, 4)], positions=True)
    with route(tiny, FOUR) as handle:
        capture(tiny, [tiny.prompt(0, 2, tiny.grid, 7)])
        (graph,) = handle._router._replays._store._held.values()
        launches = []
        monkeypatch.setattr(graph, "_replay", lambda: launches.append(tapes[0]))
        with counted(monkeypatch) as calls:
            replayed(handle, tiny, inputs)
    assert len(launches) == 1
    assert calls == {"copy_": 1, "index_select": 2, "clone": 7}
    assert len(launches) + sum(calls.values()) == 11


@pytest.mark.parametrize("name", ["llava-gqa", "qwen"])
def test_calls_into_a_static_cache(name: str, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of a part are copied in one call, and counted in another; they clear what they have as ever.

    Of each stage all rows are listed that there is room for, in two calls, or three if there is more than is needed.
    """
    tiny = models.tiny(name)
    inputs = tiny.inputs([tiny.prompt(3, 9, tiny.grid, 4)], positions=True)
    cache: Any = StaticCache(config=tiny.model.config.get_text_config(), max_cache_len=64)
    parts, stages, layers = 5, 4, tiny.num_layers
    with route(tiny, FOUR) as handle:
        capture(tiny, [tiny.prompt(0, 2, tiny.grid, 7)])
        (graph,) = handle._router._replays._store._held.values()
        monkeypatch.setattr(graph, "_replay", lambda: None)
        with counted(monkeypatch) as calls:
            replayed(handle, tiny, inputs, **{CACHE: cache})
        filling = {"_foreach_copy_": parts, "_foreach_add_": parts, "arange": stages, "cat": stages, "fill_": 3}
        given = {"copy_": 1, "index_select": 2, "clone": 2}
        assert calls == {**given, **filling, "zeros": 2 * layers}
        cache.reset()
        with counted(monkeypatch) as calls:
            replayed(handle, tiny, inputs, **{CACHE: cache})
        assert calls.pop("zeros") == 2 * layers  # of nothing
        assert calls == {**given, **filling, "zero_": 3 * layers}
