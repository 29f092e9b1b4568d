"""Placeholders of pictures are text where no picture comes with them, in whatever way the model is called."""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

import pytest
import torch
from changes import check, prompt
from models import CACHE, PICTURE, TRANSFORMERS, Sample, Tiny
from oracle import predict
from support import FEW, cache_of, close, enable, generate, same_decisions
from torch import Tensor

from reroute.errors import RerouteError


def quoted(tiny: Tiny, seed: int = 7) -> Sample:
    """Text in which a user has typed the placeholder."""
    words = tiny.prompt(seed, 9)
    return Sample((*words.ids[:3], PICTURE, *words.ids[3:6], PICTURE, PICTURE, *words.ids[6:]))


def everything(tiny: Tiny, given: dict[str, Any]) -> list[Tensor]:
    """What the model makes of ``given``, in whatever way it is called."""
    if tiny.is_qwen and TRANSFORMERS < (5, 18):
        pytest.skip("generate of this release itself looks for the pictures of placeholders")
    labels = given["input_ids"].clone()
    output = tiny.model(**given, labels=labels, output_hidden_states=True)
    ways: tuple[dict[str, Any], ...] = ({}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 4})
    return [
        output.loss,
        output.logits,
        *output.hidden_states,
        tiny.model.model(**given).last_hidden_state,
        *(generate(tiny, given, 3, **way).sequences for way in ways),
    ]


def test_placeholders_in_text(own: Tiny) -> None:
    """They are text, for Transformers too: nothing is routed, ranked or counted, and nobody is warned."""
    given = own.inputs([quoted(own), own.prompt(1, 5)])
    plain = everything(own, given)
    with enable(own, FEW) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(map(torch.equal, everything(own, given), plain))
        assert handle.totals().prefills == 0


def test_placeholders_in_text_that_ends_in_one(own: Tiny) -> None:
    """A picture could not be ranked there; text can be anything."""
    given = own.inputs([Sample((*own.prompt(0, 4).ids, PICTURE))])
    plain = everything(own, given)
    with enable(own, FEW):
        assert all(map(torch.equal, everything(own, given), plain))


def test_placeholders_in_a_later_turn(own: Tiny) -> None:
    first, second = prompt(own), quoted(own)
    with enable(own, FEW) as handle:
        cache = cache_of(own.model(**own.inputs([first]), use_cache=True))
        output = own.model(**own.follow([first], [second]), **{CACHE: cache})
        assert handle.totals().prefills == 1
    close(output.logits[0], predict(own, [first, second], FEW).logits[len(first) :])


def test_a_placeholder_that_is_fed_alone(own: Tiny) -> None:
    """As a decoding step."""
    first, second = prompt(own), Sample((PICTURE,))
    with enable(own, FEW) as handle:
        cache = cache_of(own.model(**own.inputs([first]), use_cache=True))
        output = own.model(**own.follow([first], [second]), **{CACHE: cache})
        assert handle.totals().prefills == 1
    close(output.logits[0], predict(own, [first, second], FEW).logits[len(first) :])


@pytest.mark.parametrize("how", ["too many placeholders", "too few", "no placeholders"])
def test_pictures_that_do_not_match(own: Tiny, how: str) -> None:
    """Transformers raises, and so it does while routing is on; the next call is as if nothing had been."""
    one = prompt(own)
    samples = {
        "too many placeholders": [one, quoted(own)],
        "too few": [Sample(one.ids[:4] + one.ids[6:], (), one.pixels, one.grids)],
        "no placeholders": [Sample(own.prompt(1, 9).ids, (), one.pixels, one.grids)],
    }[how]
    given = own.inputs(samples)
    with pytest.raises(ValueError, match="do not match") as plain:
        own.model(**given)
    assert not isinstance(plain.value, RerouteError)
    with enable(own, FEW) as handle, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for call in (own.model, functools.partial(own.model.generate, max_new_tokens=2)):
            with pytest.raises(ValueError, match="do not match") as routed:
                call(**given)
            assert str(routed.value) == str(plain.value)
        assert handle.totals().prefills == 0
        check(own, handle)


def test_features_instead_of_pixels(own: Tiny) -> None:
    """Pictures that were encoded before are pictures."""
    if "mm_encoder_outputs" not in inspect.signature(type(own.model).forward).parameters:
        pytest.skip("this release of Transformers has no such argument")
    sample = prompt(own)
    given: dict[str, Any] = own.inputs([sample])
    grids = (given["image_grid_thw"],) if own.is_qwen else ()
    features = own.model.model.get_image_features(given.pop("pixel_values"), *grids, return_dict=True)
    words = own.inputs([quoted(own)])
    plain = own.model(**words).logits
    with enable(own, FEW) as handle:
        output = own.model(**given, mm_encoder_outputs={"image": features})
        same_decisions(handle.trace, [predict(own, sample, FEW)])
        assert torch.equal(own.model(**words, mm_encoder_outputs={}).logits, plain)
        assert handle.totals().prefills == 1
    close(output.logits[0], predict(own, sample, FEW).logits)
