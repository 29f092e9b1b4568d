"""The stand-in for a graph fails where a graph would."""

from __future__ import annotations

import torch
from tape import Tape


def test_a_replay_reads_what_is_in_the_inputs_now() -> None:
    x, weight = torch.arange(4.0), torch.full((4,), 2.0)
    with Tape() as tape:
        y = torch.empty(4)
        y.copy_(x * weight)
        y[:2].add_(1)
    assert [t.data_ptr() for t in tape.external] == [x.data_ptr(), weight.data_ptr()]
    for _ in range(2):
        x.add_(1)
        tape.replay([y])
        assert y.tolist() == [2 * value + (index < 2) for index, value in enumerate(x.tolist())]


def test_a_number_that_the_host_has_read_is_baked_in() -> None:
    x, signatures = torch.tensor([1.0, 2.0]), []
    for _ in range(2):
        with Tape() as tape:
            y = x * float(x[1])
        signatures.append(tape.signature)
        x.add_(1)
    assert signatures[0] != signatures[1]
    tape.replay([y])
    assert y.tolist() == [9.0, 12.0]  # by the number of the recording: a graph is wrong here too


def test_memory_is_given_to_others_after_its_last_use() -> None:
    x = torch.ones(3)
    with Tape() as tape:
        y = x + 1
        z = y * 2
    tape.replay([z])
    assert z.tolist() == [4, 4, 4]
    assert y.isnan().all()
    tape.replay([])
    assert z.isnan().all()


def test_what_is_not_written_by_the_replay_is_not_there() -> None:
    """A tensor that was allocated under the tape and filled by somebody else holds nothing on replay."""
    x = torch.ones(3)
    with Tape() as tape:
        buffer = torch.empty(3)
        buffer.numpy()[:] = 5  # the host, behind PyTorch's back
        y = buffer + x
    assert y.tolist() == [6, 6, 6]
    tape.replay([y])
    assert y.isnan().all()
