"""Every type that is routed by what is found out about it, against the dense oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense import near, predict
from models import CACHE, TRANSFORMERS
from tiny_types import MARKED, PICTURE, RECURRENT, SLIDING, TYPES, TinyType, build
from torch import Tensor
from transformers import DynamicCache
from tweaks import TWEAKS

import reroute
from reroute.errors import RerouteError
from reroute.transformers import ROUTED
from reroute.transformers.prompt import has_picture

LAYERS, RATIOS = (3, 4, 5), (0.6, 0.3, 0.5)
"""Behind the levels of DeepStack; at the last one tokens come back."""
MARGIN = 1e-6


def prompt(seed: int, *parts: int) -> list[int]:
    """Text and pictures of so many tokens, in turns."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for index, count in enumerate(parts):
        ids += [PICTURE] * count if index % 2 else torch.randint(1, 140, (count,), generator=generator).tolist()
    return ids


ONE, TWO = prompt(0, 3, 8, 4), prompt(1, 2, 6, 1, 5, 5)


def batch(tiny: TinyType, *prompts: list[int]) -> dict[str, Tensor]:
    """Left-padded."""
    length = max(map(len, prompts))
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    given = {"input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in prompts]), "attention_mask": mask}
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given["position_ids"] = tiny.spread(positions)
    if tiny.marks is not None:
        given[tiny.marks] = (given["input_ids"] == PICTURE).long()
    return given


def step(tiny: TinyType, given: dict[str, Tensor], token: int, cache: Any) -> dict[str, Any]:
    """One more token for every row."""
    mask = torch.nn.functional.pad(given["attention_mask"], (0, 1), value=1)
    ids = torch.full((len(mask), 1), token)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": given["position_ids"][..., -1:] + 1, CACHE: cache}


def plan(handle: Any, given: dict[str, Tensor], cache: Any = None, **more: Any) -> Any:
    """The plan of a call with these arguments, whatever marks its visual tokens."""
    marks = given.get(next(iter(MARKED.values())))
    shown = {"input_ids": given["input_ids"]} if marks is None else {"visual_mask": marks.bool()}
    return handle.plan(**shown, attention_mask=given["attention_mask"], cache=cache, **more)


def run(handle: Any, tiny: TinyType, *prompts: list[int]) -> tuple[Any, Any]:
    """The logits of a prefill and of the token 7 after it."""
    given = batch(tiny, *prompts)
    with handle.using(plan(handle, given)):
        output = tiny.model(**given, **{CACHE: DynamicCache(config=tiny.text.config)}, use_cache=True)
        after = tiny.model(**step(tiny, given, 7, getattr(output, CACHE)), use_cache=True)
    return output.logits, after.logits


ALIKE = (
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "fast_vlm",
    "glm46v",
    "glmga",
    "got_ocr2",
    "idefics3",
    "janus",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "ovis2",
    "perception_lm",
    "pp_chart2table",
    "qianfan_ocr",
    "smolvlm",
    "video_llama_3",
    "video_llava",
    "vipllava",
)
"""Types whose decoder is one that another type has too: Llama, Qwen2, Qwen3, GLM-4V."""
LATER = ("granite4_vision",)
"""Types that the oldest supported release makes of other parts."""
SINGULAR = ("chameleon", "ernie4_5_vl_moe", "fuyu", "hunyuan_vl", "kimi_k25", "kosmos-2.5")
"""Types whose attention or experts are like no others'."""
WAYS = [("route", "eager"), ("route", "sdpa"), ("remove", "eager"), ("remove", "sdpa")]
CASES = [
    pytest.param(kind, *way, marks=[pytest.mark.slow] * (kind in ALIKE or way != WAYS[0]))
    for kind in ROUTED
    for way in (WAYS if kind in SINGULAR else WAYS[:1])
    if kind in TYPES and kind not in (*SLIDING, *RECURRENT) and (kind not in LATER or TRANSFORMERS >= (5, 24))
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "action", "attention"), CASES)
def test_a_type_against_the_oracle(kind: str, action: Any, attention: str) -> None:
    dense, tiny = build(kind), build(kind, attention)
    ratios = RATIOS if action == "route" else tuple(sorted(RATIOS, reverse=True))
    plain = tiny.model(**batch(tiny, ONE, TWO), use_cache=False).logits
    schedule = reroute.Schedule(LAYERS, ratios)
    expected = [predict(dense, [*ids, 7], LAYERS, ratios, prompt=len(ids), action=action) for ids in (ONE, TWO)]
    assert min(one.margin for one in expected) > MARGIN
    with reroute.enable(tiny.model, schedule=schedule, action=action, trace=True) as handle:
        for samples, wanted in (([ONE], expected[:1]), ([ONE, TWO], expected)):
            logits, after = run(handle, tiny, *samples)
            for b, (ids, one) in enumerate(zip(samples, wanted, strict=True)):
                assert [stage.kept[b].tolist() for stage in handle.trace] == one.kept
                near(logits[b, -len(ids) :], one.logits[:-1])
                near(after[b], one.logits[-1:])
        with handle.at(keep=1.0):
            assert torch.equal(tiny.model(**batch(tiny, ONE, TWO), use_cache=False).logits, plain)
    assert torch.equal(tiny.model(**batch(tiny, ONE, TWO), use_cache=False).logits, plain)


@torch.no_grad()
def test_tables_of_two_of_three_position_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sections need not be as many as the ids that a token has."""

    def shorter(config: Any, usual: Any = TWEAKS["glm4v_moe"]) -> None:
        usual(config)
        config.text_config.rope_parameters["mrope_section"] = [1, 1]

    monkeypatch.setitem(TWEAKS, "glm4v_moe", shorter)
    tiny = replace(build.__wrapped__("glm4v_moe"), axes=3)
    expected = predict(tiny, [*ONE, 7], LAYERS, RATIOS, prompt=len(ONE))
    with reroute.enable(tiny.model, schedule=reroute.Schedule(LAYERS, RATIOS)) as handle:
        logits, after = run(handle, tiny, ONE)
    near(logits[0], expected.logits[:-1])
    near(after[0], expected.logits[-1:])


def test_kinds_of_tokens_in_turns_that_choose_again() -> None:
    """Those of earlier turns are not kept."""
    with pytest.raises(RerouteError, match="or are told the kinds of tokens"):
        reroute.enable(build("ernie4_5_vl_moe").model, reopens=True, keep=0.6)


def test_pictures_by_other_names() -> None:
    assert has_picture({"image_patches": torch.zeros(1, 2, 3)})
    assert not has_picture({"image_patches": None})
