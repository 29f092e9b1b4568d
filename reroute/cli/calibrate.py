"""Find the schedule under which a model stays nearest to the plain one at a budget, on prompts without labels.

Each line of the prompts file is {"image": "photo.jpg", "question": "..."}; "image" may be a list, and paths are
relative to the file. Writes the schedule to a file that reroute run --schedule and reroute.enable(model, schedule=...)
take. When interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, get_args

from ..core.action import Action
from ..errors import RerouteError
from ..files import check_writable
from .common import add_device_arguments, backend_of, choose_device, positive, quiet, refusals
from .loading import DTYPES, Loaded, check_model_name, is_demo_model, load_model, open_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["add_arguments", "run"]

TINYVLM_PROMPTS: Final = 200
TINYVLM_SEED: Final = 2024
"""Other scenes than those by which the small model is evaluated."""

Ask = Callable[[], tuple[list["Image.Image"], str]]
"""Opens the pictures of a prompt; its question."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``reroute calibrate``."""
    add = parser.add_argument
    add(
        "model", nargs="?", metavar="MODEL", help="a folder, a name on the Hub, or a demo model: labels (default), text"
    )
    add("--prompts", type=Path, metavar="FILE", help="JSON lines (default for demo models: questions of their own)")
    add("--keep", type=float, required=True, help="budget: share of the visual tokens per layer, such as 0.22")
    add("--action", default="route", choices=get_args(Action), help="default: %(default)s")
    add("--methods", nargs="+", default=["pdrop", "fastv", "diverse"], metavar="NAME", help="default: %(default)s")
    add("--out", type=Path, default=Path("schedule.json"), metavar="JSON", help="default: %(default)s")
    add("--evaluations", type=positive, default=80, metavar="N", help="schedules to try (default: %(default)s)")
    add("--max-new-tokens", type=positive, default=32, metavar="N", help="of an answer (default: %(default)s)")
    add("--batch-tokens", type=positive, default=8192, metavar="N", help="most of a forward (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the search (default: %(default)s)")
    add("--dtype", default="auto", choices=DTYPES, help="default: %(default)s")
    add("--quiet", action="store_true", help="print the report alone")
    add_device_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Check what can be checked early; then load, calibrate and print."""
    from ..calibration.prompts import check_number
    from ..core.solver import check_keep

    check_writable(options.out)
    check_keep(options.keep)
    check_model_name(options.model)
    if options.prompts is None and not is_demo_model(options.model):
        raise RerouteError("Name a file with --prompts: only the demo models have questions of their own.")
    asked = list(_read(options.prompts) if options.prompts else _own_prompts())
    check_number(len(asked))
    device = choose_device(options.device, options.threads)
    backend_of(options.backend, device)
    tell: Callable[[str], object] = _silent if options.quiet else _print
    tell(f"Loading {options.model or 'the demo model'} …")
    import torch

    from ..calibration import calibrate

    with quiet(), refusals(torch.OutOfMemoryError):
        loaded = load_model(options.model, options.dtype, device)
        result = calibrate(
            loaded.model,
            (_inputs(loaded, ask) for ask in asked),
            keep=options.keep,
            action=options.action,
            methods=options.methods,
            out=options.out,
            evaluations=options.evaluations,
            max_new_tokens=options.max_new_tokens,
            batch_tokens=options.batch_tokens,
            seed=options.seed,
            backend=options.backend,
            progress=tell,
        )
    print(result, f"Schedule: {options.out.resolve()}", sep="\n")
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    """Nobody listens."""


def _inputs(loaded: Loaded, ask: Ask) -> Mapping[str, Any]:
    return loaded.inputs(*ask())


def _read(path: Path) -> Iterator[Ask]:
    """The prompts in a file; every line is checked before a picture is opened.

    Raises:
        RerouteError: the file cannot be read, or a line is no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RerouteError(f"The prompts {path} cannot be read ({error}).") from None
    return (_asked(path, number, line) for number, line in enumerate(lines, 1) if line.strip())


def _asked(path: Path, number: int, line: str) -> Ask:
    try:
        entry = json.loads(line)
        images = entry["image"]
        images = [images] if isinstance(images, str) else list(images)
        question = entry["question"] if "question" in entry else entry["text"]
        files = [path.parent / image for image in images]
        if not files or not question.strip():
            raise ValueError("nothing is asked")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise RerouteError(
            f'Line {number} of {path} is no prompt: write {{"image": "photo.jpg", "question": "Where is the cup?"}}, '
            "or a list of images."
        ) from None
    missing = next((file for file in files if not file.is_file()), None)
    if missing is not None:
        raise RerouteError(f"Line {number} of {path} names the picture {missing}, which does not exist.")
    return lambda: ([open_image(file) for file in files], question)


def _own_prompts() -> Iterator[Ask]:
    """Questions of every kind for the demo models."""
    from ..demo.tinyvlm.examples import COUNTS, Example, examples

    def ask(example: Example) -> Ask:
        return lambda: ([example.image], example.question)

    each = dict.fromkeys(COUNTS, -(-TINYVLM_PROMPTS // len(COUNTS)))
    return (ask(example) for example in examples("validation", each, TINYVLM_SEED))
