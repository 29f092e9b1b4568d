from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

import reroute
from reroute.cli import calibrate, main
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.examples import examples

KINDS = {"attr": 3, "col": 2, "hop": 3}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of eight questions about pictures beside it."""
    folder = tmp_path_factory.mktemp("prompts")
    (folder / "pictures").mkdir()
    lines = []
    for number, example in enumerate(examples("validation", KINDS)):
        example.image.save(folder / "pictures" / f"{number}.png")
        image = f"pictures/{number}.png"
        line: dict[str, Any] = {"image": image, "question": example.question, "answer": "of no interest"}
        if number == 0:
            line = {"image": [image], "text": example.question.upper()}
        lines.append(json.dumps(line))
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(lines[:4]) + "\n\n" + "\n".join(lines[4:]) + "\n")
    return file


def test_calibrate_and_run(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file of prompts to a schedule that the commands and ``enable`` take."""
    out, options = tmp_path / "found.json", ["--keep", "0.2", "--evaluations", "4"]
    model = str(tinyvlm.CHECKPOINTS["labels"])
    assert main(["calibrate", model, "--prompts", str(prompts), *options, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "routed runs: at most " in said
    assert re.findall(r"^ +(\d) of 4  KL \d\.\d{4}  best \d\.\d{4}  \d", said, re.MULTILINE) == ["1", "2", "3", "4"]
    assert re.search(r"^  calibrated route +\d", said, re.MULTILINE)
    assert "Warning: 8 prompts are few" in said
    assert said.endswith(f"Schedule: {out}\n")

    network, _ = tinyvlm.load()
    with reroute.enable(network, schedule=out, keep=0.2) as handle:
        schedule = handle.schedule
    assert sum(schedule.per_layer(1440, 12)) / 1440 / 12 == pytest.approx(0.2, abs=0.001)

    picture, page = str(prompts.parent / "pictures" / "0.png"), str(tmp_path / "page.html")
    asked = ["run", picture, "where is the leftmost digit ?", "--schedule", str(out), "--out", page]
    assert main([*asked, "--action", "route"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^schedule route ", said, re.MULTILINE)
    assert said.count("active in layers") == 1
    assert main([*asked, "--keep", "0.3"]) == 2
    assert "has the budget keep=0.2, not 0.3" in capsys.readouterr().err
    assert main([*asked, "--method", "fastv"]) == 2
    assert "Give either --schedule or --method" in capsys.readouterr().err


def test_run_removes_only_what_may_be_removed(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, picture = tmp_path / "grows.json", str(prompts.parent / "pictures" / "0.png")
    file.write_text(reroute.Schedule((2, 5), (0.1, 0.2)).to_json())
    asked = [
        "run",
        picture,
        "where is the leftmost digit ?",
        "--schedule",
        str(file),
        "--out",
        str(tmp_path / "p.html"),
    ]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "Only routed, not removed too: With action 'remove' ratios must not grow" in said
    assert "schedule remove" not in said
    assert main([*asked, "--action", "remove"]) == 2
    assert "ratios must not grow" in capsys.readouterr().err
    file.write_text(reroute.Schedule((2, 5), (0.2, 0.1)).to_json())
    assert main(asked) == 0
    assert "schedule remove" in capsys.readouterr().out


def test_the_demo_model_has_questions_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "TINYVLM_PROMPTS", 12)
    out = tmp_path / "found.json"
    assert main(["calibrate", "--keep", "0.25", "--evaluations", "1", "--quiet", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("keep 0.25 on 12 layers, action route")
    assert json.loads(out.read_text())["calibration"]["prompts"] == 12
    assert main(["calibrate", str(tinyvlm.CHECKPOINTS["labels"]), "--keep", "0.25", "--out", str(out)]) == 2
    assert "only the demo models have questions of their own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[1, 2]",
        '"text"',
        '{"question": "what is the background ?"}',
        '{"image": "pictures/0.png"}',
        '{"image": [], "question": "what is the background ?"}',
        '{"image": 3, "question": "what is the background ?"}',
        '{"image": "pictures/0.png", "question": 7}',
        '{"image": "pictures/0.png", "question": " "}',
    ],
)
def test_a_line_that_is_no_prompt_is_refused(
    prompts: Path, capsys: pytest.CaptureFixture[str], line: str, tmp_path: Path
) -> None:
    file = prompts.with_name("broken.jsonl")
    file.write_text(prompts.read_text() + line + "\n")
    out = tmp_path / "found.json"
    assert main(["calibrate", "--prompts", str(file), "--keep", "0.2", "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert "Line 10 of" in said.err
    assert "is no prompt: write" in said.err
    assert "Loading" not in said.out


def test_what_cannot_be_is_refused_early(prompts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "found.json")
    file = prompts.with_name("missing.jsonl")
    file.write_text('{"image": "pictures/99.png", "question": "what is the background ?"}')
    for options, said in (
        (["--prompts", str(file), "--keep", "0.2", "--out", out], "which does not exist"),
        (["--prompts", str(tmp_path / "none.jsonl"), "--keep", "0.2", "--out", out], "cannot be read"),
        (["--prompts", str(prompts), "--keep", "2", "--out", out], "keep = avg_T / N must be a number"),
        (["--prompts", str(prompts), "--keep", "0.2", "--out", str(tmp_path)], "it is a folder"),
        (["--prompts", str(prompts), "--keep", "0.2", "--out", out, "--device", "warp"], "cannot be used here"),
        (["--prompts", os.devnull, "--keep", "0.2", "--out", out], "0 prompts are too few"),
        (["./nowhere", "--prompts", str(prompts), "--keep", "0.2", "--out", out], "'./nowhere' is no model folder"),
    ):
        assert main(["calibrate", *options]) == 2
        found = capsys.readouterr()
        assert said in found.err
        assert "Loading" not in found.out
    dog = json.dumps({"image": "pictures/0.png", "question": "is this a dog ?"})
    file.write_text("\n".join([dog] * 4))
    assert main(["calibrate", "--prompts", str(file), "--keep", "0.2", "--out", out]) == 2
    assert "does not know 'this', 'dog'" in capsys.readouterr().err
