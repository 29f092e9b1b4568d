"""The command ``reroute``: ``demo``, ``run``, ``calibrate`` and ``doctor``.

Torch and Transformers take seconds to import: commands do so when they run, so that ``--help`` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Final

from .. import __version__
from ..errors import RerouteError

__all__ = ["main"]

COMMANDS: Final = ("demo", "run", "calibrate", "doctor")
"""One module each, with ``add_arguments(parser)`` and ``run(options) -> int``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 something is wrong here, 2 it was asked for wrongly."""
    options = _parser().parse_args(argv)
    try:
        return int(options.command(options))
    except RerouteError as error:
        print(f"reroute {options.name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reroute",
        description="Faster prefill for vision-language models by recoverable visual-token routing.",
    )
    parser.add_argument("--version", action="version", version=f"reroute {__version__}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f".{name}", __name__)
        summary = (module.__doc__ or "").split("\n")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(command=module.run)
    return parser
