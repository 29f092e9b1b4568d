"""Stages of one launch, inside a kernel: programs that wait for those of the stage before.

What a program does follows from a ticket that it takes when it starts, and it waits only for programs with lower
tickets. Those have started, so they will arrive, however few programs the GPU holds at a time and in whatever order
it starts them. A barrier of all programs would need them resident together.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def role(tickets, scorers, shares, batch):
    """Stage, sample, and number among the programs of that stage and sample."""
    ticket = tl.atomic_add(tickets, 1, sem="relaxed")
    later = ticket - scorers * batch
    if later < 0:
        stage = 0
        sample, program = ticket // scorers, ticket % scorers
    else:
        stage = 1 + later // (shares * batch)
        sample, program = later // shares % batch, later % shares
    return stage, sample, program


@triton.jit
def arrive(counter):
    """How many arrived before."""
    tl.debug_barrier()  # the stores of all threads come before the arrival of one
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def wait(counter, wanted):
    """Until ``wanted`` programs, all with lower tickets, have arrived."""
    while tl.atomic_add(counter, 0, sem="acquire") < wanted:
        pass
