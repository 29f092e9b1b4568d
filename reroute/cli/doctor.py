"""Say what this machine has, which backend would run and why, and whether routing works here."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Callable
from importlib import metadata
from typing import Final

from .common import backend_of, choose_device, quiet, shorten

__all__ = ["add_arguments", "run"]

DISTRIBUTION: Final = "reroute-vlm"
VARIABLES: Final = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "HF_HOME", "HF_HUB_OFFLINE")
"""Shown where set; ``REROUTE_BACKEND`` always is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``reroute doctor`` takes no options."""


def run(options: argparse.Namespace) -> int:
    """Print a line per check; 1 if one fails, with what to do about it."""
    checks: tuple[tuple[str, Callable[[], str], str], ...] = (
        ("python", _python, ""),
        ("packages", _packages, "Run in a clone: pip install --upgrade ."),
        ("cpu", _cpu, "Reinstall torch for this machine: https://pytorch.org/get-started"),
        ("cuda", _cuda, "Check the driver with nvidia-smi, or hide the GPU with CUDA_VISIBLE_DEVICES= (empty)."),
        ("environment", _environment, ""),
        ("backend", _backend, "Unset REROUTE_BACKEND, or set it to torch, which runs everywhere."),
        ("graphs", _graphs, "Leave graphs=True out: prefills are right without them."),
        ("models", _models, "Run in a clone: pip install --upgrade ."),
        ("tinyvlm", _tinyvlm, "If the backend is well, run in a clone: pip install --force-reinstall --no-deps ."),
    )
    failed = 0
    for name, check, remedy in checks:
        try:
            print(f"{name:13}{check()}", flush=True)
        except Exception as error:  # whatever is broken here is the finding
            failed += 1
            print(f"{name:13}FAILED: {shorten(error)}\n{'':13}{remedy}", flush=True)
    print("\nAll is well." if not failed else f"\n{failed} of {len(checks)} checks failed: see what to do above.")
    return 1 if failed else 0


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _packages() -> str:
    """Installed versions of what the distribution asks for; triton is optional."""
    from packaging.requirements import Requirement

    found = [f"{DISTRIBUTION} {metadata.version(DISTRIBUTION)}"]
    for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or ()):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = metadata.version(requirement.name)
        if not requirement.specifier.contains(version, prereleases=True):
            raise RuntimeError(f"{requirement.name} {version} is too old: {requirement} is needed.")
        found.append(f"{requirement.name} {version}")
    try:
        found.append(f"triton {metadata.version('triton')}")
    except metadata.PackageNotFoundError:
        found.append("triton not installed (CUDA only)")
    return ", ".join(found)


def _cpu() -> str:
    import torch

    return f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is built without CUDA"
        return f"no device ({built})"
    devices = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        memory = about.total_memory / 2**30
        devices.append(f"cuda:{index} {about.name}, sm_{about.major}{about.minor}, {memory:.0f} GiB")
    return "; ".join(devices)


def _environment() -> str:
    override = os.environ.get("REROUTE_BACKEND")
    shown = [f"REROUTE_BACKEND={override}" if override else "REROUTE_BACKEND not set"]
    return ", ".join(shown + [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ])


def _backend() -> str:
    backend = backend_of("auto", choose_device("auto"))
    return f"auto means {backend.name}: {backend.reason}"


def _graphs() -> str:
    """Capture a prefill of the model that ships with the package, and replay it."""
    import reroute

    from ..demo import tinyvlm
    from ..demo.tinyvlm.evaluation import answers
    from ..demo.tinyvlm.examples import examples
    from ..graphs import RECORDERS

    device = choose_device("auto")
    if device.type not in RECORDERS:
        return f"no prefill can be captured on {device.type}: CUDA graphs need a GPU"
    with quiet():
        model, processor = tinyvlm.load()
        model.to(device)  # type: ignore[arg-type]  # annotated for a mixin
        with reroute.enable(model, method="pdrop", keep=1 / 3, graphs=reroute.Graphs(max_waste=100)) as handle:
            for _ in range(3):
                answers(model, processor, examples("test", {"attr": 1}))
            use = handle.stats().graph
    if use is None or not use.is_replayed:
        raise RuntimeError(f"a prefill of tinyvlm is not replayed: {use}")
    return f"a prefill of tinyvlm: {use}"


def _models() -> str:
    from transformers import CONFIG_MAPPING

    from ..transformers import ROUTED

    here = [kind for kind in ROUTED if kind in CONFIG_MAPPING]
    return f"{len(here)} types are routed: {', '.join(here)}"


def _tinyvlm() -> str:
    """Load the models that ship with the package, and route one prompt through each."""
    import reroute

    from ..demo import tinyvlm
    from ..demo.tinyvlm.evaluation import answers
    from ..demo.tinyvlm.examples import examples

    for name in tinyvlm.CHECKPOINTS:
        with quiet():
            model, processor = tinyvlm.load(name)
            model.to(choose_device("auto"))  # type: ignore[arg-type]  # annotated for a mixin
            with reroute.enable(model, method="pdrop", keep=1 / 3) as handle:
                answers(model, processor, examples("test", {"attr": 1}))
    stats, names = handle.stats(), " and ".join(tinyvlm.CHECKPOINTS)
    return f"{names} load and route: {stats.avg_tokens:.1f} of {sum(stats.visual)} visual tokens per layer"
