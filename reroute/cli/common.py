"""What the commands share: options, devices, quiet libraries, errors in one sentence."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RerouteError

if TYPE_CHECKING:
    import torch

    from reroute_kernels import Backend

__all__ = ["add_device_arguments", "backend_of", "choose_device", "positive", "quiet", "refusals", "shorten", "written"]


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--backend`` and ``--threads``."""
    add = parser.add_argument
    add("--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, … (default: cuda if there is one)")
    add("--backend", default="auto", choices=("auto", "torch", "triton"), help="default: triton on CUDA, else torch")
    add("--threads", type=positive, metavar="T", help="CPU threads (default: torch's choice)")


def positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text}")
    return int(text)


def choose_device(name: str, threads: int | None = None) -> torch.device:
    """The device of that name, after a check that it is there; also sets the number of CPU threads.

    Raises:
        RerouteError: no such device here.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # a device that holds no numbers is none to run on
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RerouteError(f"Device {name!r} cannot be used here ({shorten(error, 90)}). Try --device cpu.") from None
    return device


def backend_of(name: str, device: torch.device) -> Backend:
    """The backend that ``name`` means on ``device``.

    Raises:
        RerouteError: it is unknown (also REROUTE_BACKEND's) or cannot run here.
    """
    from reroute_kernels import BackendUnavailable, resolve

    with refusals(ValueError, BackendUnavailable):
        return resolve(name, device)


@contextmanager
def refusals(*kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds are the user's to mend: their message is enough."""
    try:
        yield
    except RerouteError:
        raise
    except kinds as error:
        raise RerouteError(shorten(error)) from error


def shorten(error: BaseException, limit: int = 400) -> str:
    """The message of an error on one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and warnings of Transformers and the Hub's client off the screen for a while."""
    import huggingface_hub.utils.logging
    import transformers.utils.logging

    logging: Any = transformers.utils.logging  # neither is annotated throughout
    hub: Any = huggingface_hub.utils.logging
    level, hub_level, bars = logging.get_verbosity(), hub.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    hub.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub.set_verbosity(hub_level)
        if bars:
            logging.enable_progress_bar()


def written(path: Path) -> str:
    """The last line of a command that wrote a page."""
    return f"Page: {path.resolve()} (open it in any browser)"
