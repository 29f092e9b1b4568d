"""A scene of a model of one's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, MistralConfig, PixtralVisionConfig

from reroute.cli.loading import Loaded, Prompt
from reroute.cli.scenes import make_scene
from reroute.errors import RerouteError
from reroute.report import Answer, Setup

PICTURE, BREAK = 60, 61


class Words:
    decode = staticmethod(lambda tokens, **_: f"{len(tokens)} tokens")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """A Pixtral, whose model type is that of LLaVA."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    text = MistralConfig(
        **sizes, vocab_size=64, num_hidden_layers=4, num_key_value_heads=2, sliding_window=None, eos_token_id=None
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=PixtralVisionConfig(**sizes, num_hidden_layers=1, image_size=64, patch_size=8),
        image_token_index=PICTURE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config).eval()  # type: ignore[no-untyped-call]
    return Loaded("pixtral", model, Words, False)


def prompt(rows: int, columns: int, *, pictures: int = 1) -> Prompt:
    ids = [5, *([PICTURE] * columns + [BREAK]) * rows * pictures, 8, 9]
    height, width = rows * 8, columns * 8
    inputs = {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(pictures, 3, height, width),
        "image_sizes": torch.tensor([[height, width]] * pictures),
    }
    return Prompt("what ?", Image.new("RGB", (width, height)), inputs)


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (6, 4), (1, 7)])
def test_a_picture_of_any_shape(loaded: Loaded, rows: int, columns: int) -> None:
    setups = [Setup(), Setup("pdrop", "route", 0.6)]
    scene = make_scene(loaded, prompt(rows, columns), setups, "auto", Answer, 2)
    assert scene.grid == (rows, columns)
    assert scene.dense == Answer("2 tokens")
    (run,) = scene.runs
    assert run.stages[0].kept == tuple(range(rows * columns))


def test_what_cannot_be_drawn_is_refused_before_anything_runs(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.model, "generate", lambda **_: pytest.fail("it ran"))
    turned = prompt(4, 6)
    turned.inputs["image_sizes"] = torch.tensor([[48, 32]])  # type: ignore[index]
    with pytest.raises(RerouteError, match="Which patch of a picture each visual token shows is not known"):
        make_scene(loaded, turned, [Setup()], "auto", Answer, 2)
    with pytest.raises(RerouteError, match="A page shows one picture, and the prompt has 2"):
        make_scene(loaded, prompt(4, 6, pictures=2), [Setup()], "auto", Answer, 2)
