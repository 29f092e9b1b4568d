"""The tool that runs Transformers' own tests, on a checkout of two tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import upstream

TESTS = """
import reroute
import models

def keep():
    tiny = models.llava(layers=4)
    tiny.model(**tiny.inputs([tiny.prompt(3, 5, tiny.grid, 5)]))
    handle = reroute.handle_of(tiny.model)
    return 1.0 if handle is None else handle.stats().keep

def test_any():
    assert keep() > 0

def test_that_minds_routing():
    assert keep() == 1.0, "its tokens"

def test_that_cannot_be_routed():
    models.llava(layers=1).model(input_ids=models.torch.ones(1, 4, dtype=models.torch.int64))
"""


@pytest.mark.slow
def test_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tests" / "models" / "llava"
    folder.mkdir(parents=True)
    (folder / "test_modeling_llava.py").write_text(TESTS)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with pytest.raises(SystemExit) as ended:
        upstream.main([str(tmp_path), "llava", "--keep", "1", "0.5"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    refused = "  1 times: LlavaForConditionalGeneration is not routed: "
    assert lines[0] == "llava, keep=1: 3 tests, 2 of them routed, 0 differ"
    assert lines[1].startswith(f"{refused}Routing layer 1 does not exist")
    assert lines[2] == "llava, keep=0.5: 3 tests, 2 of them routed, 1 differ"
    assert lines[3].startswith("  test_that_minds_routing: passed, and failure with routing.")
    assert "its tokens" in lines[3]
    assert lines[4].startswith(f"{refused}keep = 0.5 is out of reach")


def test_tests_that_cannot_run(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="llava: pytest ended with 4"):
        upstream.main([str(tmp_path), "llava"])
