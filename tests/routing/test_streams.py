"""Prefills on several CUDA streams, on a stand-in that finds races (``races``)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from models import Tiny
from oracle import Rules
from races import Gpu, Stream
from support import enable
from torch import Tensor

from reroute.core.plan import Plan
from reroute.core.plan_tensors import PlanTensors
from reroute.core.workspace import Workspace
from reroute_kernels import PagedPool

RULES = (
    Rules((1, 2), (0.5, 0.25)),
    Rules((0, 2), (0.6, 0.3), "remove"),
    Rules((1, 2), (0.5, 0.25), "remove", position_mode="renumbered"),
    Rules((1, 2), (0.5, 0.25), score_layer_offset=-1),
)


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return models.llava(layers=4)


@pytest.fixture
def ids(tiny: Tiny) -> Tensor:
    """Of two prompts of one length."""
    return tiny.inputs([tiny.prompt(seed, 5, tiny.grid, 4) for seed in range(2)])["input_ids"]


@pytest.fixture
def run(tiny: Tiny, ids: Tensor) -> Callable[[], Tensor]:
    """A forward of these prompts, without what waits for the device: the logits."""
    embeds = torch.stack([tiny.embeds(tiny.prompt(seed, 5, tiny.grid, 4)) for seed in range(2)])
    return lambda: tiny.model(inputs_embeds=embeds).logits


@pytest.fixture
def streams(ids: Tensor, run: Any, gpu: Gpu) -> Iterator[list[Stream]]:
    """Streams; all inputs are there."""
    gpu.synchronize()
    with torch.no_grad():
        yield [gpu.new_stream() for _ in range(3)]


def pool_of(pages: int = 0) -> PagedPool:
    pool = PagedPool(64, torch.float32, "cpu", page_size=16)
    pool.lease([16 * pages]).release()
    return pool


def on(stream: Stream, call: Callable[[], Any]) -> Any:
    with stream.gpu.stream(stream):
        return call()


@pytest.mark.parametrize("rules", RULES)
def test_one_plan_on_two_streams(
    gpu: Gpu, streams: list[Stream], tiny: Tiny, ids: Tensor, run: Any, rules: Rules
) -> None:
    """The first prefill uploads the index tables of both; it still has its pages when the other begins."""
    a, b, _ = streams
    with enable(tiny, rules, pool=pool_of(8)) as handle:
        plan = handle.plan(ids)
        with gpu.stream(a), handle.using(plan):
            first = run()
            with gpu.stream(b), handle.using(plan):
                second = run()
        assert handle.stats().prefills == 2
    gpu.synchronize()
    assert torch.equal(first, second)


@pytest.mark.parametrize("rules", RULES[:2])
def test_one_place_for_two_streams(
    gpu: Gpu, streams: list[Stream], tiny: Tiny, ids: Tensor, run: Any, rules: Rules
) -> None:
    """Prefills in one ``using`` share pages and page table too. The block may end on any stream."""
    a, b, c = streams
    with enable(tiny, rules, pool=pool_of(8)) as handle:
        with handle.using(handle.plan(ids)):
            outputs = [on(a, run)]
            end = a.now
            on(a, lambda: ids + 1)
            outputs += [on(b, run), on(a, run)]
            assert 0 < b.knows(a.cuda_stream) <= end
        with handle.using(handle.plan(ids)):
            outputs.append(on(c, run))
    gpu.synchronize()
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_prefills_of_one_stream_wait_for_nothing(streams: list[Stream], tiny: Tiny, ids: Tensor, run: Any) -> None:
    stream = streams[0]
    with enable(tiny, RULES[0], pool=on(stream, pool_of)) as handle, stream.gpu.stream(stream):
        plan = handle.plan(ids)
        for _ in range(2):
            with handle.using(plan):
                for _ in range(2):
                    run()
            with handle.using(handle.plan(ids)):
                run()
    assert stream.waits == 0


def test_two_threads_make_the_tables_of_a_plan_at_once(
    gpu: Gpu, streams: list[Stream], tiny: Tiny, ids: Tensor, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both use the same ones, whichever stream they came from."""
    both = threading.Barrier(2)
    tables: dict[int, PlanTensors] = {}
    upload, tensors_of = PlanTensors.of, Plan.tensors

    def together(*args: Any) -> PlanTensors:
        both.wait(60)
        made = upload(*args)
        both.wait(60)
        return made

    def noted(*args: Any) -> PlanTensors:
        return tables.setdefault(threading.get_ident(), tensors_of(*args))

    def work(stream: Stream) -> None:
        with gpu.watching(), torch.no_grad(), handle.using(plan):
            outputs.append(on(stream, run))

    monkeypatch.setattr(PlanTensors, "of", together)
    monkeypatch.setattr(Plan, "tensors", noted)
    outputs: list[Tensor] = []
    with enable(tiny, RULES[0], pool=pool_of()) as handle:
        plan = handle.plan(ids)
        threads = [threading.Thread(target=work, args=(stream,)) for stream in streams[:2]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    first, second = tables.values()
    assert first is second
    gpu.synchronize()
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize(
    "captured_on", [0, 1, None], ids=["where it ran before", "elsewhere", "on a stream of its own"]
)
def test_replays_of_a_captured_prefill(
    gpu: Gpu, streams: list[Stream], tiny: Tiny, ids: Tensor, run: Any, captured_on: int | None
) -> None:
    """The recipe of docs/guides/cuda-graphs.md. Who gets the pages afterwards waits for the replays."""
    pool, main = pool_of(), streams[2]
    with gpu.stream(main), enable(tiny, RULES[0], pool=pool) as handle:
        with handle.using(handle.plan(ids)):
            on(streams[0], run)
            main.wait_stream(streams[0])
            with gpu.capture(None if captured_on is None else streams[captured_on]) as graph:
                run()
            for _ in range(2):
                graph.replay()
        with handle.using(handle.plan(ids)):
            on(streams[1], run)
    assert pool.stats().leases == 0


def test_an_interrupted_prefill_keeps_its_pages_until_its_stream_is_done(
    gpu: Gpu, streams: list[Stream], tiny: Tiny, ids: Tensor, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch runs no hook after Ctrl-C: the next forward gives the pages back, and it may run elsewhere."""
    layer = tiny.model.model.language_model.layers[3]

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with enable(tiny, RULES[0], pool=pool_of()) as handle:
        plans = [handle.plan(ids) for _ in range(3)]
        with monkeypatch.context() as patch, handle.using(plans[0]):
            patch.setattr(layer, "forward", interrupt)
            with pytest.raises(KeyboardInterrupt):
                on(streams[0], run)
        for stream, plan in zip(streams[1:], plans[1:], strict=True):
            with handle.using(plan):
                on(stream, run)


def test_tables_outlive_the_streams_that_read_them(streams: list[Stream], tiny: Tiny, ids: Tensor) -> None:
    """The plan may be gone while another stream than the one that uploaded them still reads."""
    with enable(tiny, RULES[0]) as handle:
        plan = handle.plan(ids)
    pool = pool_of(8)
    for stream in streams[:2]:
        with stream.gpu.stream(stream):
            workspace = Workspace(plan)
            lease, layout = workspace.take(pool)
            assert (layout.rows + lease.table.sum()).shape == layout.rows.shape
            workspace.release()
    del plan, workspace, lease, layout
    pool.trim()
