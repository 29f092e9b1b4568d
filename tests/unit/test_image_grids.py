"""Rows and columns of the visual tokens of each picture, for the page of ``reroute run``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PixtralVisionConfig,
    SiglipVisionConfig,
)

from reroute.errors import RerouteError
from reroute.transformers import adapter_of

IMAGE, BREAK, END = 60, 61, 62
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
}
VISION: dict[str, Callable[..., Any]] = {
    "clip": lambda **sizes: CLIPVisionConfig(**SIZES, **{"image_size": 32, **sizes}),
    "siglip": lambda: SiglipVisionConfig(**SIZES, image_size=48),
    "pixtral": lambda: PixtralVisionConfig(**SIZES, image_size=64),
}


def llava(vision: Any, strategy: Literal["default", "full"] = "full") -> Any:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy=strategy,
    )
    return LlavaForConditionalGeneration(config).eval()  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def pixtral() -> Any:
    return llava(VISION["pixtral"]())


def picture(rows: int, columns: int) -> list[int]:
    """As Pixtral's processor writes it."""
    return ([IMAGE] * columns + [BREAK]) * (rows - 1) + [IMAGE] * columns + [END]


def inputs(prompts: list[list[int]], sizes: list[tuple[int, int]], *, tell: bool = True) -> dict[str, Any]:
    """Of these ids and pictures, which are padded to the largest one."""
    length = max(map(len, prompts))
    given: dict[str, Any] = {"input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts])}
    given["attention_mask"] = (given["input_ids"] != 0).long()
    if sizes:
        given["pixel_values"] = torch.randn(len(sizes), 3, *(max(side) for side in zip(*sizes, strict=True)))
    if sizes and tell:
        given["image_sizes"] = torch.tensor(sizes)
    return given


def checked(model: Any, given: dict[str, Any]) -> list[list[tuple[int, int]]]:
    """The grids of a prompt that the model itself takes."""
    with torch.no_grad():
        model(**given)
    return adapter_of(model).image_grids(given)


def test_pictures_of_pixtral_have_grids_of_their_own(pixtral: Any) -> None:
    """Rows end in a token that is text; sizes differ, and so do samples."""
    prompts = [
        [5, *picture(4, 6), 7],
        [5, *picture(1, 5), 8, 9, *picture(3, 2), *picture(2, 3), 7],
        [5, 6, 7],
        [*picture(8, 8), 6, *picture(1, 1), 9],
    ]
    sizes = [(32, 48), (8, 40), (24, 16), (16, 24), (64, 64), (8, 8)]
    grids = [[(4, 6)], [(1, 5), (3, 2), (2, 3)], [], [(8, 8), (1, 1)]]
    given = inputs(prompts, sizes)
    assert checked(pixtral, given) == grids
    given["image_sizes"] = sizes  # as a list
    assert adapter_of(pixtral).image_grids(given) == grids


def test_without_sizes_they_are_those_of_the_pixels(pixtral: Any) -> None:
    given = inputs([[5, *picture(4, 6), 7], [*picture(4, 6), 5, 7]], [(32, 48)] * 2, tell=False)
    assert adapter_of(pixtral).image_grids(given) == [[(4, 6)], [(4, 6)]]


@pytest.mark.parametrize(
    ("prompts", "sizes"),
    [
        ([[5, *picture(4, 6), 7]], [(48, 32)]),  # width and height: as many tokens
        ([[5, *picture(4, 6), 7]], [(32, 40)]),
        ([[5, *picture(4, 6), 7]], [(32, 48), (8, 8)]),
        ([[5, *picture(4, 6), *picture(1, 1), 7]], [(32, 48)]),
        ([[5, *picture(4, 6), 7]], []),
        ([[5, 6, 7]], [(32, 48)]),
        ([[5, *picture(2, 3), 7], [*picture(3, 2), 7]], [(24, 16), (16, 24)]),  # those of the other sample
    ],
)
def test_what_does_not_fit_is_refused(pixtral: Any, prompts: Any, sizes: Any) -> None:
    with pytest.raises(RerouteError, match=r"Which patch .* in runs of \[\[.*use reroute\.enable and handle\.trace"):
        adapter_of(pixtral).image_grids(inputs(prompts, sizes))


def test_pictures_of_clip_are_one_square(pixtral: Any) -> None:
    """And form one run where nothing is between them."""
    model, image = llava(VISION["clip"](), "default"), [IMAGE] * 16
    given = inputs([[5, *image, *image, 7], [5, *image, 6], [5, 6]], [(32, 32)] * 3, tell=False)
    assert checked(model, given) == [[(4, 4)] * 2, [(4, 4)], []]
    assert adapter_of(model).image_grids(inputs([[5, 6]], [])) == [[]]


def test_other_towers() -> None:
    given = inputs([[5, *[IMAGE] * 36, 7]], [(48, 48)], tell=False)
    assert checked(llava(VISION["siglip"]()), given) == [[(6, 6)]]
    with_class_token = llava(VISION["clip"]())
    given = inputs([[5, *[IMAGE] * 17, 7]], [(32, 32)], tell=False)
    with pytest.raises(RerouteError, match=r"in runs of \[\[17\]\], its pictures have \[\(4, 4\)\]"):
        checked(with_class_token, given)


def test_patches_need_not_be_square(pixtral: Any) -> None:
    adapter = adapter_of(pixtral)
    given = inputs([[5, *[IMAGE] * 8, 7]], [(32, 32)], tell=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter.config.vision_config, "patch_size", [8, 16])
        assert adapter.image_grids(given) == [[(4, 2)]]
        patch.delattr(adapter.config.vision_config, "patch_size")
        with pytest.raises(RerouteError, match="Which patch"):
            adapter.image_grids(given)
