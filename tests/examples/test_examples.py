"""The scripts in examples/, on the model that ships with the package, without a network."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import reroute
from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.evaluation import prompts
from reroute.demo.tinyvlm.examples import examples

FOLDER = Path(__file__).parents[2] / "examples"
NAMES = ("cuda_graph", "own_ranker", "quickstart", "sweep")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def picture(tmp_path: Path) -> tuple[Path, str]:
    """A held-out scene in a file, and a question about it."""
    example = examples("validation", {"col": 1})[0]
    file = tmp_path / "scene.png"
    example.image.save(file)
    return file, example.question


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main_of(name: str) -> Callable[[list[str]], int]:
    main: Callable[[list[str]], int] = load(name).main
    return main


def test_every_example_is_here() -> None:
    assert tuple(sorted(file.stem for file in FOLDER.glob("*.py"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_an_example_says_what_it_needs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main_of(name)([])
    assert end.value.code == 2
    assert re.search(r"error: give .*, or --tiny$", capsys.readouterr().err, re.MULTILINE)


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("quickstart")(["--tiny"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"question  what digit .*\nplain     \w+\nrouted    \w+\n\ndiverse, route, backend torch ", said)
    assert "1 prefill recorded" in said


def test_quickstart_on_a_model_in_a_folder(picture: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    file, question = picture
    assert (
        main_of("quickstart")([str(file), question, "--model", str(tinyvlm.CHECKPOINTS["labels"]), "--keep", "0.2"])
        == 0
    )
    assert f"question  {question}\n" in capsys.readouterr().out


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.jsonl"
    assert main_of("sweep")(["--tiny", "--questions", "1", "--keep", "0.25", "--out", str(file)]) == 0
    said = capsys.readouterr().out
    settings = ["dense", "diverse remove 0.250", "diverse route 0.250"]
    assert re.findall(r"^(dense|diverse .*?)  ", said, re.MULTILINE) == settings
    dense, *others = map(json.loads, file.read_text().splitlines())
    assert (dense["avg_tokens"], dense["flops"], dense["kv_cache"]) == (144, 1, 1)
    for action, line in zip(("remove", "route"), others, strict=True):
        assert line["config"]["action"] == action
        assert line["config"]["keep"] == 0.25
        assert line["avg_tokens"] == pytest.approx(36, abs=1)
        assert line["flops"] < 0.5
        assert line["kv_cache"] < 0.5


def test_sweep_over_a_file_of_questions(
    picture: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, question = picture
    data = tmp_path / "questions.jsonl"
    lines = [{"image": file.name, "question": question, "answer": answer} for answer in ("Red", "nothing")]
    data.write_text("\n".join(map(json.dumps, lines)))
    assert main_of("sweep")(["--data", str(data), "--model", str(tinyvlm.CHECKPOINTS["labels"]), "--keep", "0.5"]) == 0
    assert capsys.readouterr().out.startswith("2 questions\n")


def test_own_ranker(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("own_ranker")(["--tiny"]) == 0
    said = capsys.readouterr().out
    assert re.match(r"question +what digit .*\nattention +\w+\nsimilarity +\w+\n", said)
    counts = re.findall(
        r"^before layer .*: each keeps (\d+) visual tokens, (\d+) of them the same$", said, re.MULTILINE
    )
    assert len(counts) == 4
    assert all(0 <= int(same) < int(kept) < 144 for kept, same in counts)


def test_cuda_graph_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main_of("cuda_graph")(["--tiny"]) == 1
    assert "needs a CUDA GPU, and PyTorch finds none" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_cuda_graph(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_of("cuda_graph")(["--tiny"]) == 0
    difference = re.search(r"largest difference of logits: (\S+)", capsys.readouterr().out)
    assert difference
    assert float(difference[1]) < 0.1


@torch.no_grad()
def test_what_is_captured_is_the_prefill_of_the_prompt() -> None:
    """On any device: the prefill that begins with the decoder gives the logits of the whole model."""
    loaders: Any = AutoModelForImageTextToText, AutoProcessor
    model, processor = (loader.from_pretrained(tinyvlm.CHECKPOINTS["labels"]) for loader in loaders)
    inputs = prompts(model, processor, examples("validation", {"hopcls": 1}))
    given = load("cuda_graph").decoder_inputs(model, inputs)
    with reroute.enable(model, keep=1 / 3) as handle:
        expected = model(**inputs).logits
        with handle.using(handle.plan(inputs["input_ids"])):
            found = model(**given).logits
        assert handle.stats().prefills == 2
    assert torch.equal(found, expected)
