"""``python tests/upstream/upstream.py CHECKOUT [TYPE ...] [--keep K ...] [-k EXPRESSION]``: Transformers' own tests.

Runs ``tests/models/TYPE/test_modeling_TYPE.py`` of a checkout of Transformers once for each K, with every model routed
at that budget, and without routing the tests that did not pass then. Prints which of these come out differently, in
how many tests prefills were routed, and why models were not. Exits with 1 if a test differs at keep=1.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

HERE = Path(__file__).parent
MAIN_TYPES = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl", "mistral3", "gemma3")


@dataclass(frozen=True)
class Run:
    """Of each test, ``passed``, ``skipped``, ``failure`` or ``error``, and why; and what routing had to do.

    ``routed``: tests with prefills of routed models. ``refused``: why models were not routed, and how often.
    """

    outcomes: dict[str, tuple[str, str]]
    routed: int
    refused: Counter[str]


def read(report: Path, module: str) -> Run:
    """A JUnit report of tests of ``module``. A test with subtests fails if one of them does."""
    found: dict[str, tuple[str, str]] = {}
    routed, refused = 0, Counter[str]()
    for case in ElementTree.parse(report).iter("testcase"):
        notes = [(note.get("name"), note.get("value", "")) for note in case.iter("property")]
        routed += any(name == "prefills" and value != "0" for name, value in notes)
        refused.update(value for name, value in notes if name == "refused")
        classes = case.get("classname", "").removeprefix(module).split(".")[1:]
        name = "::".join([*classes, case.get("name", "")])
        result = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        outcome = ("passed", "") if result is None else (result.tag, result.get("message") or "")
        if name not in found or found[name][0] not in ("failure", "error"):
            found[name] = outcome
    return Run(found, routed, refused)


def run(checkout: Path, kind: str, keep: float | None, only: Iterable[str] = (), choice: str = "") -> Run:
    """Of the tests of one type, or ``only`` of some, routed at budget ``keep``, or not at all; ``choice``: pytest's -k.

    Raises:
        SystemExit: the tests cannot be collected.
    """
    with TemporaryDirectory() as folder:
        report, file = Path(folder) / "report.xml", f"tests/models/{kind}/test_modeling_{kind}.py"
        tests = [f"{file}::{name}" for name in only] or [file]
        routed = [] if keep is None else ["--keep", str(keep)]
        options = ["-q", "--tb=no", "-W", "ignore", "-p", "no:cacheprovider", "--junitxml", str(report)]
        chosen = ["-k", choice] if choice else []
        command = [sys.executable, "-m", "pytest", *tests, *chosen, "-p", "upstream_routing", *routed, *options]
        path = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        ended = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        if ended.returncode not in (0, 1):  # 1: tests failed
            sys.exit(f"{kind}: pytest ended with {ended.returncode}\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}")
        return read(report, file.removesuffix(".py").replace("/", "."))


def first_line(message: str) -> str:
    return message.partition("\n")[0]


def differences(plain: Run, routed: Run) -> list[str]:
    """A line for each test of both that came out differently."""
    pairs = {name: (plain.outcomes[name], after) for name, after in routed.outcomes.items() if name in plain.outcomes}
    return [
        f"  {name}: {before[0]}, and {after[0]} with routing. {first_line(after[1])}".rstrip()
        for name, (before, after) in sorted(pairs.items())
        if before[0] != after[0]
    ]


def compare(checkout: Path, kind: str, budgets: Iterable[float], choice: str) -> bool:
    """Print what differs in the tests of one type at each of ``budgets``; return whether something does at 1."""
    runs = {keep: run(checkout, kind, keep, choice=choice) for keep in budgets}
    failed = {name for routed in runs.values() for name, (came, _) in routed.outcomes.items() if came != "passed"}
    plain = run(checkout, kind, None, sorted(failed)) if failed else Run({}, 0, Counter())
    for keep, routed in runs.items():
        lines, tests = differences(plain, routed), f"{len(routed.outcomes)} tests, {routed.routed} of them routed"
        refused = [f"  {count} times: {why}" for why, count in routed.refused.most_common()]
        print(f"{kind}, keep={keep:g}: {tests}, {len(lines)} differ", *lines, *refused, sep="\n", flush=True)
    return 1 in runs and bool(differences(plain, runs[1]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python tests/upstream/upstream.py", description=__doc__)
    parser.add_argument("checkout", type=Path, help="of Transformers, at the release that is installed")
    parser.add_argument(
        "types", nargs="*", default=MAIN_TYPES, help=f"folders of tests/models ({' '.join(MAIN_TYPES)})"
    )
    parser.add_argument("--keep", type=float, nargs="+", default=[1.0], help="budgets (1.0)")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="pytest's choice of tests by name")
    options = parser.parse_args(arguments)
    differs_at_one = [compare(options.checkout, kind, options.keep, options.k) for kind in options.types]
    sys.exit(int(any(differs_at_one)))


if __name__ == "__main__":
    main()
