"""Whole prefills through the Triton kernels, on every executor, against the torch backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import models
import pytest
import torch
from models import Tiny

import reroute
from reroute.rankers import LastTokenAttention, RandomScores
from reroute.transformers.parallel import HeadRanks
from reroute_kernels import Backend, SelectMetadata


@pytest.fixture(scope="module")
def backend(executor: Any) -> Iterator[Backend]:
    """What ``backend="triton"`` is on CUDA; elsewhere ``resolve`` refuses it, since nobody should wait for simt.

    No decision uploads its counts: they went up with the plan.
    """
    from reroute_kernels import ops

    def counts(metadata: SelectMetadata, device: torch.device) -> torch.Tensor:
        assert metadata.on_device is not None
        assert metadata.on_device.tolist() == [list(column) for column in metadata.as_tuple()]
        return metadata.on_device

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SelectMetadata, "counts", counts)
        yield Backend.of("triton", "under test", ops)


SCHEDULES = (
    (reroute.Schedule((1, 2, 4), (0.5, 0.25, 0.25)), "route"),
    (reroute.Schedule((1, 2, 4), (0.5, 0.3, 0.1)), "remove"),
    (reroute.Schedule((1, 3), (0.25, 0.5), (LastTokenAttention(-1),)), "route"),
)


@pytest.mark.parametrize(("schedule", "action"), SCHEDULES)
@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_selections_and_logits(
    name: str, schedule: reroute.Schedule, action: Any, backend: Backend, device: torch.device
) -> None:
    """Selections are identical, logits to rounding; a batch with fillers, padding and a row without pictures."""
    tiny: Tiny = getattr(models, name)(layers=6)
    tiny.model.to(device)
    samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 7)]
    given = {key: value.to(device) for key, value in tiny.inputs(samples).items()}
    results = []
    for kernels in (None, backend):
        with reroute.enable(tiny.model, schedule=schedule, action=action, trace=True, backend="torch") as handle:
            handle.backend = kernels or handle.backend
            output = tiny.model.generate(
                **given, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
            assert handle.trace is not None
            kept = [[rows.tolist() for rows in stage.kept] for stage in handle.trace]
            results.append((kept, output.sequences.tolist(), torch.stack(output.logits)))
    (kept, tokens, logits), (kept_by_kernels, tokens_by_kernels, logits_by_kernels) = results
    assert kept_by_kernels == kept
    assert tokens_by_kernels == tokens
    torch.testing.assert_close(logits_by_kernels, logits, rtol=0, atol=1e-4)


def test_launches_of_a_decision(backend: Backend, device: torch.device, launches: list[Any]) -> None:
    """Four, the input norm of the model included; and two more, which restore the prompt."""
    tiny = models.llava(layers=6)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    with torch.no_grad(), reroute.enable(tiny.model, schedule=SCHEDULES[0][0], backend="torch") as handle:
        handle.backend = backend
        tiny.model(**given)
    step = ["_defer_rmsnorm_kernel", "_score_kernel", "_select_kernel", "_admit_kernel"]
    assert [report.kernel for report in launches] == [*step * 3, "_defer_kernel", "_admit_kernel"]


class OneProcess(HeadRanks):
    """Tensor parallelism of one process, which talks to nobody."""

    def __init__(self) -> None:
        self.group, self.size = None, 1

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        return own[None]


def test_selections_that_processes_share(backend: Backend, executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Index tensors come as parts of one, at any address, and scores without their selection."""
    if executor.kind != "interpreter":
        pytest.skip("the kernels are those of other tests")
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, group, group_src: None)
    tiny = models.llava(layers=4)
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)])
    schedule = reroute.Schedule((1, 2), (0.5, 0.25), (LastTokenAttention(), RandomScores()))
    results = []
    for ranks in (None, OneProcess()):
        with reroute.enable(tiny.model, schedule=schedule, trace=True, backend="torch") as handle:
            handle._router.adapter.ranks = ranks
            handle.backend = backend if ranks else handle.backend
            output = tiny.model(**given)
            assert handle.stats().backend == ("triton" if ranks else "torch")
        results.append((handle.trace, output.logits))
    (expected, logits), (trace, got) = results
    assert expected is not None
    assert trace is not None
    for before, after in zip(expected, trace, strict=True):
        assert all(map(torch.equal, before.kept, after.kept))
    torch.testing.assert_close(got, logits, rtol=0, atol=1e-4)
