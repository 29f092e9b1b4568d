"""Every Markdown file: its links and anchors resolve, the files and tests that it names exist, its Python is real."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("reroute", "reroute_kernels")
FOLDERS = ("bench", "docs", "examples", "reroute", "reroute_kernels", "tests", "training")
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*([^)\s]+)\s*\)|(?:src|href|srcset)=\"([^\"]+)\"")
WRITTEN = {"bench/results/"}  # by commands, and not in the tree
NAMED = re.compile(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]+)(?:::(\w+))?`")


def markdown() -> list[str]:
    """Paths of all Markdown files, but for those of environments and caches."""
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(str(path) for path in found if not any(p[0] == "." and p != ".github" for p in path.parts[:-1]))


def prose(path: Path) -> str:
    """The text of a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.+?) *#*$", prose(path), flags=re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = first = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while slug in found:
            number += 1
            slug = f"{first}-{number}"
        found.add(slug)
    return found


@pytest.mark.parametrize("name", markdown())
def test_links_resolve(name: str) -> None:
    page, broken = ROOT / name, []
    for match in LINK.finditer(re.sub(r"`[^`\n]*`", "", prose(page))):
        link = match[1] or match[2]
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("name", [name for name in markdown() if name != "CHANGELOG.md"])  # which names what there was
def test_named_files_and_tests_exist(name: str) -> None:
    """Those in backticks, such as `tests/docs/test_links.py` or `tests/docs/test_links.py::test_links_resolve`."""
    missing = []
    for path, function in NAMED.findall(prose(ROOT / name)):
        file = ROOT / path
        if path in WRITTEN or "NAME" in path:
            continue
        if not file.exists() or (function and f"def {function}(" not in file.read_text()):
            missing.append(f"{path}::{function}" if function else path)
    assert not missing


@pytest.mark.parametrize("figure", [path.name for path in (ROOT / "docs" / "figures").glob("*.svg")])
def test_figures_are_small_and_need_nothing_from_elsewhere(figure: str) -> None:
    text = (ROOT / "docs" / "figures" / figure).read_text()
    assert len(text) < 20_000
    assert re.findall(r"https?://[^\"]+", text) == ["http://www.w3.org/2000/svg"]
    assert "prefers-color-scheme: dark" in text
    assert [child.tag.rpartition("}")[2] for child in ElementTree.fromstring(text)][:2] == ["title", "desc"]


# --- Python in pages --------------------------------------------------------------------------------------------------


def blocks() -> Iterator[Any]:
    """The Python code of README and guides, and of the pages that show how methods are used."""
    pages = ["README.md", "docs/reference/methods.md", *(n for n in markdown() if n.startswith("docs/guides/"))]
    for name in pages:
        for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", (ROOT / name).read_text(), re.M | re.S), 1):
            yield pytest.param(code, id=f"{name}-{number}")


@pytest.mark.parametrize("code", list(blocks()))
def test_python_blocks_compile_and_use_what_there_is(code: str) -> None:
    """Attributes of the packages, what is imported from them, and keywords of calls to them."""
    compile(code, "page", "exec")
    tree = ast.parse(code)
    names: dict[str, Any] = {package: importlib.import_module(package) for package in PACKAGES}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            module = importlib.import_module(node.module)
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, names)
        if isinstance(node, ast.Call) and (function := resolve(node.func, names)) is not None:
            taken = inspect.signature(function).parameters
            assert {k.arg for k in node.keywords if k.arg} <= set(taken), ast.unparse(node)


def resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    """What an expression such as ``reroute.methods.FastV`` is; None if it does not begin with one of ``names``."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute) or (owner := resolve(node.value, names)) is None:
        return None
    if not isinstance(owner, ModuleType | type):
        return None  # of an instance, whose attributes are known when it is made
    assert hasattr(owner, node.attr), f"there is no {ast.unparse(node)}"
    return getattr(owner, node.attr)
