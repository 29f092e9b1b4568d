from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from PIL import Image

import reroute
from reroute.cli import demo, doctor, main, run, setups
from reroute.cli.scenes import pick
from reroute.config import DEFAULT_METHOD
from reroute.core.schedule import Schedule
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.examples import examples
from reroute.demo.tinyvlm.questions import KINDS
from reroute.report.results import FAMILIES, Results

QUESTION = "Where is the leftmost digit?"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    examples("test", {"ext": 1})[0].image.save(path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "page.html"


def data_of(page: Path) -> list[dict[str, Any]]:
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"https?://(?!www\.w3\.org)", text)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    scenes: list[dict[str, Any]] = json.loads(found[1])["scenes"]
    return scenes


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from reroute.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("demo", "run", "calibrate", "doctor"))
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"reroute {reroute.__version__}\n"


def test_python_m_reroute_works() -> None:
    done = subprocess.run([sys.executable, "-m", "reroute", "run"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "IMAGE" in done.stderr


# --- doctor -----------------------------------------------------------------------------------------------------------


def test_doctor_finds_a_healthy_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REROUTE_BACKEND", raising=False)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "auto means torch: " in said or "auto means triton: " in said
    assert "qwen2_5_vl" in said
    assert re.search(r"labels and text load and route: 4\d\.\d of 144", said)


def test_doctor_says_what_to_do(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REROUTE_BACKEND", "tritn")
    monkeypatch.setitem(tinyvlm.CHECKPOINTS, "text", tmp_path)  # the other one is found
    assert main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "Unset REROUTE_BACKEND" in said
    assert "--force-reinstall" in said
    assert "2 of 9 checks failed" in said


def test_doctor_knows_old_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=99", "nothing; extra == 'dev'"])
    with pytest.raises(RuntimeError, match=r"torch .* too old"):
        doctor._packages()


# --- run --------------------------------------------------------------------------------------------------------------


def test_run_answers_three_ways_and_writes_the_page(
    picture: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(picture), QUESTION, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "where is the leftmost digit ?" in said
    for name in ("dense", "Diverse remove", "Diverse route"):
        assert len(re.findall(f"^{name}", said, re.MULTILINE)) >= 2  # answer and cost
    (scene,) = data_of(out)
    assert scene["grid"] == [12, 12]
    assert [run["action"] for run in scene["runs"]] == ["remove", "route"]
    assert [len(stage["kept"]) for stage in scene["runs"][1]["stages"]] == [85, 28, 28]
    assert sorted(p.name for p in out.parent.iterdir()) == ["page.html", "scene.png"]


def test_run_uses_the_method_that_enable_uses() -> None:
    assert run.METHOD == DEFAULT_METHOD


def test_run_can_do_one_action_of_a_model_in_a_folder(
    picture: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tinyvlm.CHECKPOINTS["labels"]), "--method", "fastv", "--action", "route", "--keep", "0.2"]
    question = "where is the leftmost digit ?"
    assert main(["run", str(picture), question, *options, "--out", str(out)]) == 0
    (scene,) = data_of(out)
    assert scene["dense"] is None
    assert [run["action"] for run in scene["runs"]] == ["route"]
    assert main(["run", str(picture), question, *options, "--compare", "--out", str(out)]) == 0
    assert data_of(out)[0]["dense"] is not None


def test_run_shows_what_the_model_saw(tmp_path: Path, out: Path) -> None:
    wide = tmp_path / "wide.jpg"
    Image.new("RGB", (300, 100), "red").save(wide)
    assert main(["run", str(wide), "what is the red digit ?", "--out", str(out)]) == 0
    assert data_of(out)[0]["size"] == [96, 96]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "fastw"], r"Unknown method 'fastw'; known: cdpruner, .*, fastv, .*, vscan"),
        (["--method", "pdrop", "--keep", "0.05"], r"keep = 0.05 is out of reach"),
        (["--keep", "1"], r"--keep must lie between 0 and 1"),
        (["--model", "./nowhere"], r"'\./nowhere' is no model folder"),
        (["--model", ""], r"'' is no model folder"),
        (["--model", "/"], r"The folder / holds no model: it has no config\.json"),
        (["--model", "nobody/nothing"], r"The model nobody/nothing cannot be loaded: .* Without a network"),
        (["--device", "abacus"], r"Device 'abacus' cannot be used here"),
        (["--device", "meta"], r"Device 'meta' cannot be used here"),
        (["--backend", "triton", "--device", "cpu"], r"backend='triton' cannot run"),
        (["--out", "/nowhere/page.html"], r"the folder /nowhere does not exist"),
        (["--out", "/proc/page.html"], r"Cannot write /proc/page.html"),
    ],
)
def test_run_refuses_in_one_sentence(
    options: list[str],
    says: str,
    picture: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert main(["run", str(picture), QUESTION, "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert re.match(f"reroute run: .*{says}", said)
    assert said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.png", None, "There is no picture"),
        ("text.png", b"hello", "not a picture that can be read"),
        ("cut.png", "cut", "cannot be read"),
        (".", None, "is a folder"),
    ],
)
def test_run_refuses_what_is_no_picture(
    name: str, content: bytes | str | None, says: str, picture: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = out.parent / name
    if content is not None:
        path.write_bytes(picture.read_bytes()[:3000] if isinstance(content, str) else content)
    assert main(["run", str(path), QUESTION, "--out", str(out)]) == 2
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_run_refuses_models_and_questions_it_cannot_treat(
    picture: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = out.parent / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    assert main(["run", str(picture), QUESTION, "--model", str(folder), "--out", str(out)]) == 2
    assert "(model type 'bert'): its configuration names no visual tokens" in capsys.readouterr().err
    assert main(["run", str(picture), " ", "--out", str(out)]) == 2
    assert "Ask something" in capsys.readouterr().err
    assert main(["run", str(picture), "is this a dog ?", "--out", str(out)]) == 2
    assert "does not know 'this', 'dog'" in capsys.readouterr().err


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo_prints_the_tables_and_writes_the_page(
    out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "TIMED_PROMPTS", 1)
    monkeypatch.setattr(demo, "TIMED_BATCH", 2)
    monkeypatch.setattr(demo, "ROUNDS", 1)
    monkeypatch.setattr(setups, "BUDGETS", (0.11, 0.049))
    schedule = tmp_path / "mine.json"
    schedule.write_text(Schedule((0, 4), (0.2, 0.05)).to_json())
    options = ["--questions", "1", "--condition", "noise-1", "--schedule", str(schedule), "--out", str(out)]
    assert main(["demo", *options]) == 0
    said = capsys.readouterr().out
    rows = re.findall(
        r"^  (?:FastV|PDrop|Calibrated|Diverse|DivPrune|Random|mine) +(?:route|remove)", said, re.MULTILINE
    )
    assert len(rows) == 2 * 11 + 2
    assert len(re.findall(r"^  .* out of reach", said, re.MULTILINE)) == 4
    assert "10 % of the visual tokens per layer" in said  # the schedule's own
    assert re.search(r"^  norm +[\d.]+ +[\d.]+ +[+-]", said, re.MULTILINE)
    assert "n = 1 questions per column; demo model 'labels'; gaussian noise of sigma 1 rms" in said
    assert f"Page: {out}" in said
    scenes = data_of(out)
    assert {"two-hop grounding", "riddle grounding", "one-hop grounding"} <= {scene["kind"] for scene in scenes}
    assert all(len(scene["runs"]) == 10 for scene in scenes)
    routes = [run for run in scenes[0]["runs"] if run["action"] == "route"]
    assert all(set(stage["back"]) <= set(stage["kept"]) for run in routes for stage in run["stages"])


def test_demo_refuses_before_it_works(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "it is a folder" in capsys.readouterr().err


def test_every_kind_gets_its_share() -> None:
    families: Counter[str] = Counter()
    for kind, count in demo.family_counts(7).items():
        families[KINDS[kind].family] += count
    assert dict(families) == dict.fromkeys(FAMILIES, 7)


def test_scenes_are_picked_for_and_against_routing(make_results: Callable[..., Results]) -> None:
    results = make_results(lambda setup, family: 0.5)
    chosen = pick(results)
    kinds = [results.families[i] for i, _ in chosen]
    assert kinds[:5] == ["two-hop grounding", "two-hop grounding", "riddle grounding", "two-hop VQA", "riddle VQA"]
    assert kinds[5] == "one-hop grounding"
    counts = rf"in (\d+) of {len(results.pairs)} routed and (\d+)"
    leads = [int(a) - int(b) for _, why in chosen for a, b in re.findall(counts, why)]
    assert min(leads[:5]) > 0
    assert leads[-1] < 0
    assert len({i for i, _ in chosen}) == len(chosen)
