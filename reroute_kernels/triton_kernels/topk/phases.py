"""Phases of one launch, inside a kernel: programs that wait for those of the phase before.

What a program does follows from a ticket that it takes when it starts, and it waits only for programs with lower
tickets. Those have started, so they will arrive, however few programs the GPU holds at a time and in whatever order
it starts them. A barrier of all programs would need them resident together.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_scheduler(tickets_ptr, num_score_programs, num_chunks, batch):
    """The phase and sample of this program, and its number among the programs of both."""
    ticket = tl.atomic_add(tickets_ptr, 1, sem="relaxed")
    later = ticket - num_score_programs * batch
    if later < 0:
        phase = 0
        sample, program = ticket // num_score_programs, ticket % num_score_programs
    else:
        phase = 1 + later // (num_chunks * batch)
        sample, program = later // num_chunks % batch, later % num_chunks
    return phase, sample, program


@triton.jit
def arrive(counter_ptr):
    """Signal arrival; the number of earlier arrivals."""
    tl.debug_barrier()  # the stores of all threads come before the arrival of one
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel")


@triton.jit
def wait(counter_ptr, expected):
    """Spin until ``expected`` programs, all with lower tickets, have arrived."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < expected:
        pass
