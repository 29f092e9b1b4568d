"""Measure prefill, decode and memory on this machine: ``python -m bench.end_to_end [--quick] [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from reroute_kernels import resolve

from . import decode, flops, memory, prefill
from .models import LLAVA_7B, QUICK, STANDARD
from .tables import print_flops, print_measured, print_parts

THREADS = 2
NOTE = "times are CPU times of this machine; nothing here was measured on a GPU"


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="python -m bench.end_to_end", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    options = parser.parse_args()
    torch.set_num_threads(1 if options.quick else THREADS)  # one thread also gets on where the machine is busy
    prefills, decoded, memories = quick() if options.quick else full()
    modelled = flops.table()
    environment = _environment()
    print_measured(prefills, decoded, memories, targets=not options.quick)
    print_parts(prefills)
    print_flops(modelled)
    print(f"\n{', '.join(f'{name} {value}' for name, value in environment.items())}\n{NOTE}")
    if options.json:
        results: dict[str, Any] = {
            "environment": environment,
            "note": NOTE,
            "quick": options.quick,
            "prefill": [result.to_json() for result in prefills],
            "decode": decoded.to_json(),
            "memory": [result.to_json() for result in memories],
            "modelled": [asdict(row) for row in modelled],
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def full() -> tuple[list[prefill.PrefillResult], decode.DecodeResult, list[memory.MemoryResult]]:
    """A few minutes on two cores."""
    large = STANDARD.with_side(48)
    return (
        [prefill.measure(STANDARD, rounds=25), prefill.measure(large, rounds=7)],
        decode.measure(STANDARD, rounds=100),
        [
            *(memory.count("8 layers, fp32", STANDARD.with_side(side)) for side in (24, 34, 48)),
            *(
                memory.count("LLaVA-1.5-7B, bf16", LLAVA_7B.with_side(side), torch.bfloat16, fake=True)
                for side in (24, 48)
            ),
        ],
    )


def quick() -> tuple[list[prefill.PrefillResult], decode.DecodeResult, list[memory.MemoryResult]]:
    """A few seconds. Its times say nothing: the model is so small that routing itself outweighs it."""
    fake = memory.count("tiny, fp32, without data", QUICK, fake=True)
    return (
        [prefill.measure(QUICK, rounds=3)],
        decode.measure(QUICK, rounds=3),
        [memory.count("tiny, fp32", QUICK), fake],
    )


def _environment() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "backend": resolve("auto", torch.device("cpu")).name,
    }


if __name__ == "__main__":
    main()
