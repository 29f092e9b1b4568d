"""Every refusal of a model, a cache or a call has its words on the page of limits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/limits.md").read_text()
KINDS = ("RerouteError", "UnsupportedModelError", "UnsupportedCacheError")
SETTINGS = (
    "config.py",
    "errors.py",
    "core/schedule.py",
    "core/solver.py",
    "methods",
    "rankers/attention.py",
    "rankers/base.py",
    "rankers/folded.py",
    "rankers/duplication.py",
    "rankers/last_rows.py",
    "rankers/random.py",
    "rankers/rater_attention.py",
    "registry.py",
    "schedule_file.py",
)
"""Where settings are refused that no model could have; the page does not quote them one by one."""
COMMANDS = ("calibration", "cli", "files.py", "report")
"""What refuses to a person who waits for a result. The page is of the routing of models."""


def words(node: ast.expr, names: dict[str, ast.expr]) -> str:
    """What a literal says, with … for what is only known when it is raised."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part, names) for part in node.values)
    value = node.value if isinstance(node, ast.FormattedValue) else node
    named = value.func if isinstance(value, ast.Call) else value
    return words(names[named.id], names) if isinstance(named, ast.Name) and named.id in names else "…"


def named_texts(node: ast.stmt) -> Iterator[tuple[str, ast.expr]]:
    """Constants of a module, and what its functions of one line return."""
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        yield node.targets[0].id, node.value
    if isinstance(node, ast.FunctionDef) and isinstance(node.body[-1], ast.Return) and node.body[-1].value is not None:
        yield node.name, node.body[-1].value


def refusals() -> Iterator[tuple[str, str]]:
    """Where each error is made, raised there or not, and its sentence."""
    package = ROOT / "reroute"
    left_out = [package / place for place in (*SETTINGS, *COMMANDS)]
    files = [f for f in sorted(package.rglob("*.py")) if not {f, *f.parents}.intersection(left_out)]
    trees = {file: ast.parse(file.read_text()) for file in files}
    names = {name: value for tree in trees.values() for node in tree.body for name, value in named_texts(node)}
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in KINDS:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", words(node.args[0], names)


SENTENCES = dict(refusals())
PHRASES = [re.sub(r"\s+", " ", phrase) for phrase in re.findall(r"“([^”]+)”", PAGE)]


@pytest.mark.parametrize("where", SENTENCES)
def test_each_refusal_is_on_the_page(where: str) -> None:
    sentence = SENTENCES[where]
    assert any(phrase in sentence for phrase in PHRASES), (
        f"{where} refuses something that docs/reference/limits.md does not have. Give it a row there that quotes a "
        f"part of its sentence between “ and ”: {sentence}"
    )


@pytest.mark.parametrize("phrase", PHRASES)
def test_each_phrase_is_a_refusal(phrase: str) -> None:
    assert any(phrase in sentence for sentence in SENTENCES.values()), (
        f"docs/reference/limits.md quotes “{phrase}”, and no refusal says so. Quote what it says now, or drop the row."
    )


@pytest.mark.parametrize("place", [*SETTINGS, *COMMANDS])
def test_what_is_left_out_is_there(place: str) -> None:
    assert (ROOT / "reroute" / place).exists()
