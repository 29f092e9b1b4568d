"""Runs checks in two processes that talk by gloo: what the tests of tensor parallelism and of FSDP2 share.

One server imports everything once; the processes are forks of it.
"""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from multiprocessing.queues import Queue
from pathlib import Path

import torch
import torch.distributed as dist

WORLD = 2
PATIENCE = 60
"""Seconds after which a process that waits for another one gives up."""

Check = Callable[[Path], None]
"""Runs in each process at the same time, and fails by raising. The folder is the same one, for models on disk."""
Outcomes = Mapping[str, str]
"""What went wrong in each check, in whichever process; empty if nothing did."""


def in_two_processes(module: str, folder: Path) -> Outcomes:
    """Run all of ``CHECKS`` of a module of tests, in their order, after its ``PREPARE`` in one process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module])
    said: Queue[tuple[int, str, str]] = context.Queue()
    ranks = [context.Process(target=_run, args=(module, rank, folder, said), daemon=True) for rank in range(WORLD)]
    for process in ranks:
        process.start()
    try:
        return _collect(ranks, said)
    finally:
        for process in ranks:
            process.join(5)
            process.kill()


def _collect(ranks: list[ForkServerProcess], said: Queue[tuple[int, str, str]]) -> Outcomes:
    outcomes: dict[str, str] = {}
    ended = 0
    while ended < len(ranks):
        rank, name, problem = said.get(timeout=3 * PATIENCE)
        ended += not name
        if name:
            outcomes[name] = outcomes.get(name, "") + (f"process {rank}: {problem}\n" if problem else "")
    return outcomes


def _run(module: str, rank: int, folder: Path, said: Queue[tuple[int, str, str]]) -> None:
    # Transformers asks the environment, as torchrun sets it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/rendezvous", timedelta(seconds=PATIENCE), rank=rank, world_size=WORLD
    )
    checks: Mapping[str, Check] = __import__(module).CHECKS
    for name, check in checks.items():
        problem = ""
        try:
            check(folder)
            dist.barrier()
        except BaseException:
            problem = traceback.format_exc()
        said.put((rank, name, problem))
        if problem:
            break  # the other process may wait in another call: neither can go on
    said.put((rank, "", ""))
    said.close()
    said.join_thread()
    os._exit(0)  # without waiting for the other one


def same_everywhere(value: torch.Tensor) -> None:
    """``value`` has the same bits in all processes."""
    every = [torch.empty_like(value) for _ in range(WORLD)]
    dist.all_gather(every, value.contiguous())
    assert all(torch.equal(one.view(torch.uint8), every[0].view(torch.uint8)) for one in every)
