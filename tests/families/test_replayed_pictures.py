"""Prefills of the main families by graphs, with pictures that are merged, and features that come between layers."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_types
import torch
from dense import near
from models import CACHE, TRANSFORMERS
from pictured import PICTURED, Pictured, Prompt
from tape import Tape
from tiny_types import TinyType
from torch import Tensor

import reroute
from reroute.errors import RerouteError
from reroute.transformers.adapters import FeatureForm, ModelAdapter, adapter_of, added_before

REPLAYED = ["qwen2_vl", "qwen3_vl", "glm4v", "internvl", "llava_onevision", "mistral3", "smolvlm"]
BETWEEN = {
    "cohere_compass": (1, 2),
    "cosmos3_omni": (1, 2, 3),
    "qwen3_vl": (1, 2, 3),
    "qwen3_vl_moe": (1, 2, 3),
    **({"granite4_vision": (1, 2), "granite_docling": (1, 2, 3)} if TRANSFORMERS >= (5, 24) else {}),
}
"""Types whose decoder adds features of pictures between layers, and before which."""
ROUTED: dict[str, Any] = {"schedule": reroute.Schedule((2, 4), (0.5, 0.3))}
GRAPHS = reroute.Graphs(max_waste=10)
TOKENS = 4

pytestmark = pytest.mark.usefixtures("_without_gradients")


def with_sdpa(tiny: TinyType) -> TinyType:
    """A copy: other tests have the same models with eager attention."""
    model, text = copy.deepcopy((tiny.model, tiny.text))
    model.set_attn_implementation("sdpa")
    return replace(tiny, model=model, text=text)


@functools.cache
def family_of(name: str) -> Pictured:
    family = PICTURED[name]()
    return replace(family, tiny=with_sdpa(family.tiny))


def captured(family: Pictured, prompts: list[Prompt], **settings: Any) -> Any:
    """A handle; ``prompts`` have come twice."""
    handle = reroute.enable(family.tiny.model, graphs=GRAPHS, **settings)
    for _ in range(2):
        family.tiny.model(**family.inputs(prompts))
    return handle


def replayed(handle: Any, family: Pictured, inputs: dict[str, Any]) -> Any:
    output = family.tiny.model(**inputs, use_cache=True)
    assert handle.stats().graph.is_replayed, handle.stats().graph
    return output


def same(mine: Any, eager: Any, valid: Tensor) -> None:
    """Logits of tokens, and the rows that routed layers hold."""
    near(mine.logits[valid], eager.logits[valid])
    for its, other in zip(getattr(mine, CACHE).layers, getattr(eager, CACHE).layers, strict=True):
        real = valid
        if hasattr(other, "rows"):
            real = other.all_positions_until(int(other.get_seq_length())) >= 0
            assert torch.equal(its.all_positions_until(int(its.get_seq_length())) >= 0, real)
        for name in ("keys", "values"):
            states, others = getattr(its, name).transpose(1, 2), getattr(other, name).transpose(1, 2)
            shown = real[:, real.shape[1] - others.shape[1] :]  # by a window only the last ones
            near(states[shown], others[shown])


@pytest.mark.usefixtures("tapes")
@pytest.mark.parametrize(
    ("name", "action"), [*((name, "route") for name in REPLAYED), ("qwen3_vl", "remove"), ("qwen3_vl", None)]
)
def test_prefills_and_decoding(name: str, action: Any) -> None:
    """Of pictures of other sizes, elsewhere in the prompt, than those of the capture; ``None``: everything is kept."""
    family = family_of(name)
    settings = {"keep": 1.0} if action is None else {"action": action, **ROUTED}
    for batch in (1, 2):
        new = [family.prompt(2, 6, 2), family.prompt(5, 1, 5)][:batch]
        inputs, generated = family.inputs(new), []
        given = {"do_sample": False, "max_new_tokens": TOKENS, "output_logits": True, "return_dict_in_generate": True}
        with reroute.enable(family.tiny.model, **settings):
            eager = family.tiny.model(**inputs, use_cache=True)
            generated.append(family.tiny.model.generate(**inputs, **given))
        with captured(family, [family.prompt(4, 3, 5), family.prompt(1, 2, 4)][:batch], **settings) as handle:
            same(replayed(handle, family, inputs), eager, inputs["attention_mask"].bool())
            generated.append(family.tiny.model.generate(**inputs, **given))
        assert torch.equal(*(its.sequences for its in generated))
        near(*(torch.stack(its.logits) for its in generated))


@pytest.mark.usefixtures("tapes")
def test_features_without_fillers_bit_for_bit() -> None:
    family = family_of("qwen3_vl")
    short = family.prompt(2, 3, 5)
    first, second = (family.prompt(seed, 3, 64 - len(short.ids) + 5) for seed in (4, 2))
    assert len(second.ids) == 64
    inputs = family.inputs([second])
    eager = family.tiny.model(**inputs)
    with captured(family, [first], keep=1.0) as handle:
        assert torch.equal(replayed(handle, family, inputs).logits, eager.logits)


@pytest.mark.usefixtures("tapes")
def test_a_prompt_without_a_picture_beside_one_with_features() -> None:
    family = family_of("qwen3_vl")
    alone = Prompt([5, 9, 17, 4, 80], {name: its[:0] for name, its in family.pictures(0).items()})
    inputs = family.inputs([alone, family.prompt(2, 7, 2)])
    with reroute.enable(family.tiny.model, **ROUTED):
        eager = family.tiny.model(**inputs, use_cache=True)
    with captured(family, [family.prompt(4, 3, 5), family.prompt(1, 2, 4)], **ROUTED) as handle:
        same(replayed(handle, family, inputs), eager, inputs["attention_mask"].bool())


def test_two_recordings_with_features_are_one(tapes: list[Tape]) -> None:
    """Where visual tokens are, and how many, is no part of a graph."""
    family = family_of("qwen3_vl")
    for prompts in ([family.prompt(4, 3, 5), family.prompt(1, 2, 4)], [family.prompt(2, 9, 1), family.prompt(5, 4, 7)]):
        with captured(family, prompts, **ROUTED):
            pass
    first, second = tapes
    assert first.signature == second.signature


@pytest.mark.usefixtures("tapes")
def test_a_warm_up_captures_features_too() -> None:
    family = family_of("qwen3_vl")
    prompt = family.prompt(2, 3, 5)
    inputs, visual = family.inputs([prompt]), sum(token == tiny_types.PICTURE for token in prompt.ids)
    with reroute.enable(family.tiny.model, **ROUTED):
        eager = family.tiny.model(**inputs, use_cache=True)
    with reroute.enable(family.tiny.model, graphs=GRAPHS, **ROUTED) as handle:
        handle.warm_up(visual=visual, text=8)
        same(replayed(handle, family, inputs), eager, inputs["attention_mask"].bool())
        assert handle.stats().graph.graphs == 1


def test_features_of_padding_run_eagerly(tapes: list[Tape]) -> None:
    """There are more than the plan has visual tokens."""
    family = family_of("qwen3_vl")
    inputs = family.inputs([family.prompt(2, 1, 5)])
    both = {name: torch.cat([its, its], int(name not in family.pictures(2))) for name, its in inputs.items()}
    both["attention_mask"][:, : inputs["input_ids"].shape[1]] = 0
    with reroute.enable(family.tiny.model, **ROUTED):
        eager = family.tiny.model(**both)
    with reroute.enable(family.tiny.model, graphs=GRAPHS, **ROUTED) as handle:
        for _ in range(3):
            output = family.tiny.model(**both)
        assert "not one for each visual token" in handle.stats().graph.why
    assert torch.equal(output.logits, eager.logits)
    assert not tapes


@pytest.mark.skipif(TRANSFORMERS < (5, 24), reason="this release makes the type of other parts")
@pytest.mark.usefixtures("tapes")
def test_features_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Granite's decoder gets them in a mapping, with a mask of three dimensions. Its tower is stood in for."""
    tiny = with_sdpa(tiny_types.build("granite4_vision"))
    width = tiny.text.config.hidden_size

    def features(self: Any, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(deepstack_features=[(2, [pixel_values[..., :width]]), (1, [pixel_values[..., width:]])])

    monkeypatch.setattr(type(tiny.model.model), "get_image_features", features)

    def inputs(seed: int, before: int, visual: int, after: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(1, 140, (1, before + visual + after), generator=generator)
        ids[:, before : before + visual] = tiny_types.PICTURE
        return {"input_ids": ids, "pixel_values": torch.randn(visual, 2 * width, generator=generator)}

    new = inputs(1, 4, 11, 6)
    with reroute.enable(tiny.model, **ROUTED):
        eager = tiny.model(**new)
    with reroute.enable(tiny.model, graphs=GRAPHS, **ROUTED) as handle:
        for _ in range(2):
            tiny.model(**inputs(0, 2, 9, 3))
        output = tiny.model(**new)
        assert handle.stats().graph.is_replayed, handle.stats().graph
    near(output.logits, eager.logits)


def form_of(adapter: ModelAdapter) -> FeatureForm:
    form = FeatureForm.of(adapter)
    assert form is not None
    return form


@pytest.mark.parametrize("name", BETWEEN)
def test_where_features_are_added_is_found_out(name: str) -> None:
    adapter = adapter_of(tiny_types.build(name).model)
    assert added_before(adapter, form_of(adapter)) == BETWEEN[name]
    assert adapter.first_layer == max(BETWEEN[name])


def _scaled(states: Tensor, marked: Tensor, features: Tensor) -> Tensor:
    return states.masked_scatter(marked[..., None], states[marked] + 2 * features)


def _everywhere(states: Tensor, marked: Tensor, features: Tensor) -> Tensor:
    return _scaled(states, marked, features / 2) + features.mean()


@pytest.mark.parametrize("other", [_scaled, _everywhere, lambda states, *_: states])
def test_a_decoder_that_does_something_else_with_features(
    other: Any, tapes: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs eagerly, whatever it does."""
    family = family_of("qwen3_vl")
    monkeypatch.setattr(type(family.tiny.text), "_deepstack_process", lambda self, *args: other(*args))
    adapter = adapter_of(family.tiny.model)
    assert added_before(adapter, form_of(adapter)) is None
    inputs = family.inputs([family.prompt(2, 3, 5)])
    with reroute.enable(family.tiny.model, **ROUTED):
        eager = family.tiny.model(**inputs)
    with captured(family, [family.prompt(2, 3, 5)], **ROUTED) as handle:
        assert torch.equal(family.tiny.model(**inputs).logits, eager.logits)
        assert "are not simply added to visual tokens" in handle.stats().graph.why
        with pytest.raises(RerouteError, match="No graph can be captured"):
            handle.warm_up(visual=16, text=8)
    assert not tapes
