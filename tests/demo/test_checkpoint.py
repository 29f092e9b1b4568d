from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reroute.demo import tinyvlm
from reroute.demo.tinyvlm import architecture, probes
from reroute.demo.tinyvlm import vocabulary as vocab
from reroute.demo.tinyvlm.evaluation import answers, evaluate, prompts
from reroute.demo.tinyvlm.examples import examples
from training.tinyvlm import export

shipped = pytest.mark.parametrize("name", tinyvlm.CHECKPOINTS)
COUNTS = {"attr": 3, "hop": 2, "col": 2, "riddle": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small untrained checkpoint."""
    path = tmp_path_factory.mktemp("export") / "checkpoint"
    export.write(architecture.build(architecture.config(2, 32, 1), seed=0), path)
    return path


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def test_export_keeps_the_weights(folder: Path) -> None:
    model = architecture.build(architecture.config(2, 32, 1), seed=0)
    loaded, _ = tinyvlm.load(folder)
    assert not loaded.training
    assert loaded.dtype == torch.float32
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].half().float(), after[k]) for k in before)


def test_processor_makes_the_prompts_of_the_training(folder: Path) -> None:
    model, processor = tinyvlm.load(folder)
    chosen = examples("validation", COUNTS)
    inputs = prompts(model, processor, chosen)
    for row, example in enumerate(chosen):
        ids = inputs["input_ids"][row][inputs["attention_mask"][row].bool()].tolist()
        assert ids == [*vocab.PREFIX, *[vocab.IMAGE] * 144, *vocab.prompt(example.question)]
        assert inputs["attention_mask"][row, -1] == 1, "padding must be on the left"
    assert inputs["pixel_values"].shape == (len(chosen), 3, 96, 96)
    assert float(inputs["pixel_values"].min()) >= -1
    assert float(inputs["pixel_values"].max()) <= 1
    text = processor.decode(vocab.tokens(["<3>", "seven"]))  # type: ignore[no-untyped-call]
    assert text.strip() == "<3> seven"


def test_batched_answers_equal_single_ones(folder: Path) -> None:
    model, processor = tinyvlm.load(folder)
    chosen = examples("validation", COUNTS)
    done: list[int] = []
    batched = answers(model, processor, chosen, batch_size=3, progress=done.append)
    assert done == [3, 6, 8]
    assert batched == answers(model, processor, chosen, batch_size=1)


def test_dtype_and_attention_are_passed_on(folder: Path) -> None:
    model, _ = tinyvlm.load(folder, torch.bfloat16, "eager")
    assert model.dtype == torch.bfloat16
    assert model.config.get_text_config()._attn_implementation == "eager"


def test_depth_probe(folder: Path) -> None:
    model, processor = tinyvlm.load(folder, attn_implementation="eager")
    shares = probes.depth(model, processor, examples("validation", COUNTS))
    assert set(shares) == {
        *(("one-hop grounding", "target"), ("one-hop VQA", "target")),
        *(("two-hop grounding", "target"), ("two-hop grounding", "referent")),
        ("riddle grounding", "target"),
    }
    assert all(len(v) == 2 and all(0 <= x <= 1 for x in v) for v in shares.values())


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train the model again"):
        tinyvlm.load(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        tinyvlm.load(copy)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_file_is_refused(copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cannot be loaded.*Reinstall"):
        tinyvlm.load(copy)


def test_weights_of_another_model_are_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not fit"):
        tinyvlm.load(copy)


def test_import_is_cheap() -> None:
    # The module alone: what its parent package imports is not its business.
    code = (
        "import runpy, sys; runpy.run_path(sys.argv[1]); "
        "sys.exit(bool({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, tinyvlm.__file__]).returncode == 0


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown model 'tiny'; known models are labels, text"):
        tinyvlm.load("tiny")


@shipped
def test_shipped_checkpoint_is_complete_and_small(name: str) -> None:
    folder = tinyvlm.CHECKPOINTS[name]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert "/" not in (folder / "tokenizer_config.json").read_text().replace("</s>", "")


@shipped
def test_shipped_checkpoint_answers(name: str) -> None:
    model, processor = tinyvlm.load(name)
    assert model.config.get_text_config().num_hidden_layers == architecture.LAYERS
    outcomes = evaluate(model, processor, examples("validation", {"col": 24, "cls": 24}))
    assert sum(outcome.correct for outcome in outcomes) / len(outcomes) > 0.7


def test_shipped_checkpoints_differ_in_their_weights_alone() -> None:
    one, other = (
        {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        for folder in tinyvlm.CHECKPOINTS.values()
    )
    assert {name for name in one | other if one.get(name) != other.get(name)} == {"model.safetensors"}
