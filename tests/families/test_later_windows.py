"""Layers that see all of the prompt, and a window of what comes after it: Unlimited OCR's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from dense import near, predict
from models import CACHE
from test_types import ONE, batch, prompt, step
from test_windows import LAYERS, TOKENS, decode, stored_rows, talk
from tiny_types import TYPES, WINDOW, TinyType, build
from transformers import DynamicCache

import reroute
from reroute.errors import RerouteError, UnsupportedCacheError
from reroute.transformers.cache.reference import RoutedReferenceLayer

if "unlimited_ocr" not in TYPES:
    pytest.skip("a later release has it", allow_module_level=True)

RATIOS = (0.4, 0.7)
SCHEDULE = reroute.Schedule(LAYERS, RATIOS)
LONG = 2 * WINDOW + 3


@pytest.fixture
def tiny() -> TinyType:
    return build("unlimited_ocr", "sdpa", layers=8)


def answered(tiny: TinyType, handle: Any, ids: list[int], **settings: Any) -> list[int]:
    """What ``generate`` adds to ``ids``, whose pictures are merged already."""
    given = torch.tensor([ids])
    tiny.model.generation_config.update(pad_token_id=0, eos_token_id=None)
    with handle.using(handle.plan(given)):
        mask = torch.ones_like(given)
        settings = {"max_new_tokens": LONG, "do_sample": False, **settings}
        output = tiny.model.generate(input_ids=given, attention_mask=mask, **settings)
    return list(output[0, len(ids) :].tolist())


@torch.no_grad()
def test_generation(tiny: TinyType) -> None:
    """``generate`` tells the cache how long the prompt is, of which stages run less."""
    dense = build("unlimited_ocr", layers=8)
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        answer = answered(tiny, handle, ONE)
    ids = [*ONE, *answer]
    logits = predict(dense, ids, LAYERS, RATIOS, prompt=len(ONE)).logits
    assert answer == logits[len(ONE) - 1 : -1].argmax(-1).tolist()
    all_of_it = predict(replace(dense, later=None), ids, LAYERS, RATIOS, prompt=len(ONE)).logits
    assert not torch.allclose(all_of_it[-1], logits[-1], atol=0.01), "the window has to be seen in this answer"


@torch.no_grad()
def test_other_samples(tiny: TinyType) -> None:
    """As beams make them."""
    other, cache = prompt(1, 2, 5, 1, 3, 4), DynamicCache(config=tiny.text.config)
    ids = [*other, *TOKENS]
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        talk(handle, tiny, cache, [[ONE, other], *([[token]] * 2 for token in TOKENS[:-1])])
        cache.reorder_cache(torch.tensor([1, 1]))  # type: ignore[arg-type]  # any tensor of integers
        given = batch(tiny, ids[:-1], ids[:-1])
        logits = tiny.model(**step(tiny, given, TOKENS[-1], cache), use_cache=True).logits
    expected = predict(build("unlimited_ocr", layers=8), ids, LAYERS, RATIOS, prompt=len(other)).logits
    near(logits[:, -1], expected[-1:].expand(2, -1))


@torch.no_grad()
def test_what_is_stored(tiny: TinyType) -> None:
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        _, _, cache = decode(handle, tiny, ONE)
        layers: Any = cache.layers
        kept = [layer.prefill_keys.shape[-2] for layer in layers]
        assert kept[0] == len(ONE)
        assert kept[3] == len(ONE) - 8 + int(0.4 * 8)
        assert [stored_rows(layer) for layer in layers] == [WINDOW - 1] * 8
        assert isinstance(layers[3], RoutedReferenceLayer)
        assert cache.get_seq_length() == len(ONE) + len(TOKENS)
        assert handle.stats().layer_lengths == tuple(kept)
        with pytest.raises(UnsupportedCacheError, match="only its 8 tokens"):
            layers[3].crop(-9)
        layers[3].reset()
        assert type(layers[3]) is type(layers[0]).plain


@torch.no_grad()
def test_later_turns(tiny: TinyType) -> None:
    """Text goes on with the window. Pictures would be seen through it."""
    cache, said = DynamicCache(config=tiny.text.config), [[ONE], [[5, 6, 7]], [[8]], [[9, 10]]]
    dense, ids = build("unlimited_ocr", layers=8), [*ONE, *range(5, 11)]
    with reroute.enable(tiny.model, schedule=SCHEDULE) as handle:
        logits = talk(handle, tiny, cache, said)
        near(logits[0], predict(dense, ids, LAYERS, RATIOS, prompt=len(ONE)).logits)
        given = batch(tiny, [*ids, *prompt(3, 1, 4, 2)])
        with pytest.raises(RerouteError, match="see a window of all that comes after the first prompt"):
            handle.plan(given["input_ids"][:, len(ids) :], given["attention_mask"], cache)
        more = {**given, **{name: given[name][:, len(ids) :] for name in ("input_ids", "position_ids")}}
        with handle.at(keep=1.0):
            tiny.model(**more, **{CACHE: cache}, use_cache=True)
