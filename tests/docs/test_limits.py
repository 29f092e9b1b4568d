"""Every refusal of a model, a cache or a call has its words on the page of limits."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reference/limits.md").read_text()
PLACES = ("reroute/transformers", "reroute/core/plan.py", "reroute/core/home.py", "reroute/api.py", "reroute/handle.py")
KINDS = ("RerouteError", "UnsupportedModelError", "UnsupportedCacheError")


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
    """Where each is raised, and its sentence."""
    files = [file for place in PLACES for file in sorted((ROOT / place).rglob("*.py")) or [ROOT / place]]
    trees = {file: ast.parse(file.read_text()) for file in files}
    names = {name: value for tree in trees.values() for node in tree.body for name, value in named_texts(node)}
    for file, tree in trees.items():
        for node in (node for node in ast.walk(tree) if isinstance(node, ast.Raise)):
            raised = node.exc
            if isinstance(raised, ast.Call) and isinstance(raised.func, ast.Name) and raised.func.id in KINDS:
                yield f"{file.relative_to(ROOT)}:{node.lineno}", words(raised.args[0], names)


SENTENCES = dict(refusals())
PHRASES = [re.sub(r"\s+", " ", phrase) for phrase in re.findall(r"“([^”]+)”", PAGE)]


@pytest.mark.parametrize("where", SENTENCES)
def test_each_refusal_is_on_the_page(where: str) -> None:
    sentence = SENTENCES[where]
    assert any(phrase in sentence for phrase in PHRASES), f"quote a part of it in docs/reference/limits.md: {sentence}"


@pytest.mark.parametrize("phrase", PHRASES)
def test_each_phrase_is_a_refusal(phrase: str) -> None:
    assert any(phrase in sentence for sentence in SENTENCES.values()), "no refusal says so any more"
