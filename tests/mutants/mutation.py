"""Faults planted in the Triton kernels one at a time, to see whether the tests notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
KERNELS = Path("reroute_kernels/triton_kernels")
SCORE = "tests/kernels/test_score_topk.py"
DTYPES = "tests/kernels/test_score_dtypes.py"
SELECT = "tests/kernels/test_select.py"
CAPACITIES = "tests/kernels/test_capacities.py"
DIVERSE = "tests/kernels/test_diverse_topk.py"
ROWS = "tests/kernels/test_rows.py"
NORM = "tests/kernels/test_defer_rmsnorm.py"
LAUNCHES = "tests/kernels/test_launch_emulation.py"
MACHINE_CODE = "tests/kernels/test_machine_code.py"

NO_EXECUTOR = ""  # for tests that run none
# Where a fault shows. Triton's interpreter runs one program after the other, and checks no address.
BOTH = ("interpreter", "simt:90")
COMPILED = ("simt:90",)
INTERPRETED = ("interpreter",)


@dataclass(frozen=True)
class Mutant:
    """One fault: in a file of the kernels, ``old`` becomes ``new``.

    tests: what of pytest's arguments selects the tests that should notice. executors: which run them, one after the
    other until a test fails. equivalent: why no result changes. unseen: why no test can notice a result that does.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str
    executors: tuple[str, ...] = BOTH
    equivalent: str = ""
    unseen: str = ""

    @property
    def survives(self) -> bool:
        """Whether that is what is expected."""
        return bool(self.equivalent or self.unseen)

    def applied(self, text: str) -> str:
        """The text of the file with the fault. ValueError if it does not hold ``old`` exactly once."""
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {self.old!r} {count} times; a mutant wants it once")
        return text.replace(self.old, self.new)
