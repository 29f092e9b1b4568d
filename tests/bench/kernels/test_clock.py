"""Clocks, of a device on a stand-in."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.kernels.clock import Clock, DeviceClock, HostClock
from reroute_kernels.testing import cuda_graph


def test_clocks() -> None:
    ran: list[int] = []
    clock = HostClock()
    clock.run(lambda: ran.append(1))
    assert ran == [1]
    assert 0 < clock() == clock.seconds
    with pytest.raises(NotImplementedError):
        Clock().run(lambda: None)


@pytest.mark.parametrize(("mode", "waits"), [("eager", ["wait"]), ("graph", [])])
def test_device_clock(mode: Any, waits: list[str]) -> None:
    """Before it starts, data and dirty lines leave the cache; an eager run begins on an idle device."""
    did: list[str] = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            did.append(f"{func.overloadpacket} of {args[0].nbytes}")
            return func(*args, **(kwargs or {}))

    event, properties = mock.Mock(), mock.Mock(L2_cache_size=64)
    event.return_value.elapsed_time.return_value = 2.0
    event.return_value.record.side_effect = lambda: did.append("record")
    with (
        mock.patch.object(torch.cuda, "Event", event),
        mock.patch.object(torch.cuda, "get_device_properties", return_value=properties),
        mock.patch.object(torch.cuda, "synchronize", side_effect=lambda device: did.append("wait")),
    ):
        clock = DeviceClock(torch.device("cpu"))
        with Log():  # type: ignore[no-untyped-call]
            clock.run(lambda: did.append("run"), mode)
    assert did == ["aten.zero_ of 128", "aten.sum of 128", *waits, "record", "run", "record"]
    assert clock() == 0.002


def test_capture_warms_up_and_returns_the_captured_result(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []

    def run() -> int:
        runs.append(1)
        return len(runs)

    recorder = mock.MagicMock()
    recorder.return_value.rehearse.side_effect = lambda run: run()
    recorder.return_value.record.side_effect = lambda run: run() or recorder.replay
    monkeypatch.setattr(cuda_graph, "CudaRecorder", recorder)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    replay = cuda_graph.captured(run)
    assert (replay(), replay(), len(runs)) == (2, 2, 2)
    assert recorder.replay.call_count == 2
    recorder.assert_called_once_with(torch.device("cuda", 1))
