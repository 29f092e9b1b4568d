"""Machine code of the Triton kernels, without a GPU: ``python -m reroute_kernels.inspect``.

Compiles every launch of the catalogue for each architecture and reads registers, spills and instructions from
the binary, with the disassembler that comes with Triton.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

ARCHITECTURES = (80, 90, 100, 120)
REGISTERS_PER_SM = 65536
# Of a streaming multiprocessor: resident warps and blocks, bytes of shared memory (CUDA programming guide).
_LIMITS = {80: (64, 32, 164 << 10), 90: (64, 32, 228 << 10), 100: (64, 32, 228 << 10), 120: (48, 24, 100 << 10)}
_WIDTH = re.compile(r"\.(8|16|32|64|128|256)\b")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Facts:
    """Of one kernel on one architecture.

    Attributes:
        registers: per thread.
        spills: loads and stores of local memory.
        shared: bytes of a block.
        occupancy: share of the warps that can be resident.
        wide: global loads and stores of 16 bytes.
        narrow: the other ones.
    """

    case: str
    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    occupancy: float
    wide: int
    narrow: int
    barriers: int
    instructions: int


def inspect(arch: int, only: str = "") -> Iterator[Facts]:
    """Facts of every kernel of the catalogue's launches whose name contains ``only``. Imports triton."""
    from .triton_kernels.catalogue import CASES
    from .triton_kernels.offline import compiling_for

    for case in CASES:
        if only in case.name:
            with compiling_for(arch) as launches:
                case.launch()
            for launch in launches:
                counts, registers = _disassemble(launch.cubin)
                yield _facts(case.name, launch.kernel, arch, launch.warps, launch.shared_bytes, registers, counts)


def _facts(case: str, kernel: str, arch: int, warps: int, shared: int, registers: int, counts: Counter[str]) -> Facts:
    base: Counter[str] = Counter()
    for opcode, count in counts.items():
        base[opcode.partition(".")[0]] += count
    # Copies from global to shared memory, LDGSTS, move as many bytes as a load does.
    wide = narrow = 0
    for opcode, count in counts.items():
        if opcode.startswith(("LDG", "STG")):
            width = _WIDTH.search(opcode)
            if width and int(width[1]) >= 128:
                wide += count
            else:
                narrow += count
    return Facts(
        case=case,
        kernel=kernel,
        arch=arch,
        registers=registers,
        spills=base["LDL"] + base["STL"],
        shared=shared,
        occupancy=_occupancy(arch, registers, warps, shared),
        wide=wide,
        narrow=narrow,
        barriers=base["BAR"],
        instructions=sum(counts.values()) - base["NOP"],
    )


def _occupancy(arch: int, registers: int, warps: int, shared: int) -> float:
    """Resident share of the warps. Registers come in units of 256 a warp, and a block keeps 1 KiB for itself."""
    most_warps, most_blocks, most_shared = _LIMITS[arch]
    by_registers = REGISTERS_PER_SM // (-(-registers * 32 // 256) * 256) // warps
    blocks = min(most_blocks, most_warps // warps, by_registers, most_shared // (shared + 1024))
    return blocks * warps / most_warps


def _disassemble(cubin: bytes) -> tuple[Counter[str], int]:
    """How often each instruction occurs, and the registers of a thread."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        code = _tool("nvdisasm", "-c", str(file))
        usage = _tool("cuobjdump", "-res-usage", str(file))
    registers = re.search(r"REG:(\d+)", usage)
    counts = Counter(_INSTRUCTION.findall(code))
    if registers is None or not counts:
        raise RuntimeError(f"the disassembler's output is not understood: {usage}{code[:400]}")
    return counts, int(registers[1])


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed with status {done.returncode}: {done.stderr.strip()}")
    return done.stdout + done.stderr  # cuobjdump reports on either


def table(facts: Sequence[Facts]) -> str:
    """A line per kernel and architecture."""
    names = [field.name for field in fields(Facts)]
    rows = [names]
    for fact in facts:
        values = [getattr(fact, name) for name in names]
        rows.append([f"{value:.0%}" if isinstance(value, float) else str(value) for value in values])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [w.ljust(n) if i < 2 else w.rjust(n) for i, (w, n) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(words))
    return "\n".join(lines)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m reroute_kernels.inspect", description=__doc__)
    parser.add_argument("--arch", type=int, action="append", choices=ARCHITECTURES, help="default: all")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    print(table([fact for arch in options.arch or ARCHITECTURES for fact in inspect(arch, options.only)]))


if __name__ == "__main__":
    main()
