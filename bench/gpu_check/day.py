"""Goes through steps until they or the time are over, and keeps the record."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from .environment import difference, machine, printed, source
from .plan import MOST_AT_ONCE, RESERVE, Step, batches, expected
from .program import Ended, side_by_side
from .record import Record, Result, Status

__all__ = ["FAILED", "NOTHING_RUN", "NO_START", "PASSED", "UNFINISHED", "WRONG", "Day", "judged"]

PASSED, FAILED, NOTHING_RUN, UNFINISHED, NO_START, WRONG = range(6)
"""Exit statuses. UNFINISHED is also that of a program that has more to measure; WRONG is that of a smoke test only."""
SEVERITY: tuple[Status, ...] = ("passed", "skipped", "unfinished", "failed")
LINES = 40  # of the output of a program that failed, in the table

Run = Callable[[Sequence[Step], int, Callable[[], float], Path], Iterator[tuple[Step, Ended]]]


class Day:
    """So many minutes on a machine with a GPU, which begin now."""

    def __init__(
        self, record: Record, minutes: float, clock: Callable[[], float] = time.monotonic, run: Run = side_by_side
    ) -> None:
        """Another clock and what runs programs are for tests."""
        self._record, self._clock, self._run_programs = record, clock, run
        self._begin = clock()
        self._end = self._begin + 60 * minutes - RESERVE
        self._at_once = min(MOST_AT_ONCE, len(os.sched_getaffinity(0)))
        self._source = source()

    def left(self) -> float:
        """Seconds in which something may still run."""
        return self._end - self._clock()

    def stop(self) -> None:
        """Let the time be over: what runs is killed, and what was found is written."""
        self._end = min(self._end, self._clock())

    def go_through(self, steps: Sequence[Step]) -> int:
        """The exit status. The first step is the smoke test: it always runs, and nothing else does if it cannot."""
        smoke, *others = steps
        todo = [step for step in others if not self._record.passed(step.name)]
        seconds = expected([smoke, *todo], self._at_once)
        self._say(f"{1 + len(todo)} steps, {len(others) - len(todo)} passed before; {seconds:.0f} s expected")
        [(_, started)] = self._run([smoke])
        here = printed(started.output)
        if started.code == NOTHING_RUN:
            return self._refuse(judged(smoke, [started]).detail)
        if differs := difference(self._record.environment, here):
            return self._refuse(f"{self._record.folder} is of another machine ({differs}); choose another --out")
        self._record.environment |= {**here, **machine(), "source": self._source}
        new = [step for step in (smoke, *todo) if step.name not in self._record.results]
        self._record.add(*(Result(step.name, "unfinished", 0.0, step.estimate, "not begun") for step in new))
        self._finish(smoke, [started])
        if started.cause == "limit" or (started.cause == "itself" and started.code not in (PASSED, WRONG)):
            self._say("the kernels do not start: nothing else is worth its time")
            return NO_START
        self._work_on(todo)
        unfinished = [step for step in todo if self._record.results[step.name].status == "unfinished"]
        self._work_on([step for step in unfinished if self.left() > step.least])
        statuses = {self._record.results[step.name].status for step in steps}
        return FAILED if "failed" in statuses else UNFINISHED if "unfinished" in statuses else PASSED

    def _work_on(self, steps: Sequence[Step]) -> None:
        for batch in batches(steps):
            ended: dict[str, list[Ended]] = {step.name: [] for step in batch}
            with closing(self._run(batch)) as programs:  # or they would run on after an error here
                for step, program in programs:
                    ended[step.name].append(program)
                    if len(ended[step.name]) == len(step.programs):
                        self._finish(step, ended[step.name])

    def _run(self, batch: Sequence[Step]) -> Generator[tuple[Step, Ended], None, None]:
        """Run programs, and keep what they print."""
        for step, ended in self._run_programs(batch, self._at_once, self.left, self._record.measured):
            if ended.seconds:
                if step.output:
                    self._record.keep(step.output, ended.output)
                text = f"(in {step.output})" if step.output else ended.output
                self._record.log(f"{step.name}: exit status {ended.code} after {ended.seconds:.0f} s", text)
            yield step, ended

    def _finish(self, step: Step, ended: Sequence[Ended]) -> None:
        result, known = judged(step, ended, self._source), self._record.results[step.name]
        if result.seconds or not known.seconds:  # else what was found before is worth more
            self._record.add(result)
        self._say(f"{result.status:10} {step.name:22} {result.seconds:4.0f} s  {result.detail}")

    def _refuse(self, why: str) -> int:
        self._say(why)
        return NOTHING_RUN

    def _say(self, what: str) -> None:
        print(f"{self._clock() - self._begin:4.0f} s  {what}", flush=True)


def judged(step: Step, ended: Sequence[Ended], source: str = "") -> Result:
    """What the programs of a step come to: the worst of them."""
    each = [(_status(step, program), program) for program in ended]
    worst = max((status for status, _ in each), key=SEVERITY.index)
    those = [program for status, program in each if status == worst]
    detail = "; ".join(dict.fromkeys(_detail(step, program) for program in those))
    end = "\n".join(line for program in those for line in program.output.splitlines()[-LINES:])
    seconds = round(max(program.seconds for program in ended), 1)
    return Result(step.name, worst, seconds, step.estimate, detail, end if worst == "failed" else "", source)


def _status(step: Step, ended: Ended) -> Status:
    if ended.cause != "itself":
        return {"missing": "skipped", "time": "unfinished", "limit": "failed"}[ended.cause]  # type: ignore[return-value]
    if step.excuse and re.search(step.excuse, ended.output):
        return "skipped"
    if step.measures and ended.code == UNFINISHED:
        return "unfinished"
    return "passed" if ended.code == step.status and re.search(step.evidence, ended.output) else "failed"


def _detail(step: Step, ended: Ended) -> str:
    """In a line."""
    lines = [line.strip("= ") for line in ended.output.splitlines() if line.strip("= ")] or ["no output"]
    if ended.cause == "limit":
        return f"killed at its limit of {step.limit:.0f} s: {lines[-1]}"
    if ended.cause != "itself":
        return f"out of time after {ended.seconds:.0f} s: {lines[-1]}" if ended.seconds else lines[-1]
    if step.excuse and (excuse := re.search(f".*({step.excuse}).*", ended.output)):
        return excuse[0].strip("= ")
    if ended.code not in (step.status, UNFINISHED if step.measures else None):
        return f"exit status {ended.code}: {lines[-1]}"
    if not re.search(step.evidence, ended.output):
        return f"exit status {ended.code}, but what it printed does not match {step.evidence!r}"
    return f"in {step.output}" if step.output else lines[-1]
