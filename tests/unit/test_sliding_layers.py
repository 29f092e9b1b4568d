"""Routed cache layers that keep a window, against one that forgets nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from reroute.errors import UnsupportedCacheError
from reroute.transformers.attention import decode_mask, prefill_mask
from reroute.transformers.cache import RoutedLayer, RowPositions, guard, has_stored, route_layer, visible_rows

WINDOW = 5
Layer: Any = DynamicSlidingWindowLayer


def rows(positions: Tensor) -> Tensor:
    """Keys (B, 1, S, 1) that are their own positions."""
    return positions[:, None, :, None].float()


class Both:
    """A layer that keeps a window, and all positions (B, T) that it was ever given."""

    def __init__(self, prompt: list[list[int]], logical: int, floor: int | None = None) -> None:
        self.all, self.length = torch.tensor(prompt), logical
        self.cache = DynamicCache()
        self.cache.layer_class_to_replicate = None
        self.cache.layers = [Layer(sliding_window=WINDOW)]
        self.layer.update(rows(self.all), rows(self.all))
        floor = logical if floor is None else floor
        fillers = bool((self.all < 0).any())
        route_layer(self.cache, 0, RowPositions(self.all, logical, floor, fillers, None, (1,)))

    @property
    def layer(self) -> Any:
        return self.cache.layers[0]

    def add(self, count: int) -> None:
        """New tokens; what they get is what the layer says, and all that their windows show."""
        new = torch.arange(self.length, self.length + count).expand(len(self.all), -1)
        expected, sizes = self.layer.key_positions_with(count), self.layer.get_mask_sizes(count)
        plain = Layer(sliding_window=WINDOW)
        plain.update(*[torch.zeros(1, 1, self.length, 1)] * 2)
        assert sizes == plain.get_mask_sizes(count)
        self.layer.allow_update()
        keys, values = self.layer.update(rows(new), rows(new))
        self.all, self.length = torch.cat([self.all, new], 1), self.length + count
        assert torch.equal(keys, values)
        assert torch.equal(keys[:, 0, :, 0].long(), expected)
        assert self.layer.get_seq_length() == self.length
        for given, every in zip(expected, self.all, strict=True):
            seen = [p for p in every.tolist() if p > self.length - count - WINDOW]
            assert given.tolist()[-len(seen) :] == seen
        assert has_stored(self.cache, 0, self.all.shape[1])

    def crop(self, count: int) -> None:
        self.layer.crop(-count)
        self.all, self.length = self.all[:, : self.all.shape[1] - count], self.length - count


PROMPT = [[0, 1, 4, 5, 9, 10], [-1, -1, 2, 3, 6, 10]]
"""Rows of a prompt of 11 tokens."""


def test_long_answers() -> None:
    both = Both(PROMPT, 11)
    for count in (1, 1, 1, 3, 1, 8, 1):
        both.add(count)
        assert both.layer.keys.shape[-2] == min(WINDOW - 1, both.all.shape[1])
        assert visible_rows(both.cache, 0, both.length) == both.layer.keys.shape[-2]


def test_short_prompts() -> None:
    """All of it is there while the sequence is no longer than a window."""
    both = Both([[0, 2]], 3)
    for _ in range(5):
        both.add(1)


def test_tokens_that_are_taken_back() -> None:
    """Assisted generation records what windows would drop."""
    both = Both(PROMPT, 11, floor=9)
    both.layer.activate_past_recording()
    for count, back in ((1, 0), (4, 2), (3, 3), (6, 1), (1, 0)):
        both.add(count)
        both.crop(back)
        assert both.layer.keys.shape[-2] == WINDOW - 1
    both.add(1)
    both.add(2)  # without a crop in between
    with pytest.raises(UnsupportedCacheError, match="Cannot crop"):
        both.layer.crop(-20)


def test_tokens_that_were_not_recorded() -> None:
    both = Both(PROMPT, 11, floor=9)
    both.add(2)
    with pytest.raises(RuntimeError, match="does not track past states"):
        both.layer.crop(-1)


@pytest.mark.parametrize(
    ("name", "given", "picked"),
    [
        ("reorder_cache", torch.tensor([1, 1]), [1, 1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
        ("batch_select_indices", torch.tensor([1]), [1]),
    ],
)
def test_other_samples(name: str, given: Any, picked: list[int]) -> None:
    both = Both(PROMPT, 11)
    both.add(1)
    getattr(both.layer, name)(given)
    both.all = both.all[picked]
    both.add(1)
    both.add(3)


def test_reset() -> None:
    both = Both(PROMPT, 11)
    both.layer.activate_past_recording()
    both.layer.reset()
    assert type(both.layer) is DynamicSlidingWindowLayer
    assert (both.layer.sliding_window, both.layer.record_past, both.layer.get_seq_length()) == (WINDOW, True, 0)
    assert vars(both.layer).keys() == vars(Layer(sliding_window=WINDOW)).keys()


def test_layers_before_the_first_decision() -> None:
    """They keep what they have, and refuse what routed ones must."""
    cache = Both(PROMPT, 11, floor=9).cache
    dense = Layer(sliding_window=WINDOW)
    dense.update(*[torch.zeros(2, 1, 11, 1)] * 2)
    cache.layers = [dense, DynamicLayer(), *cache.layers]  # type: ignore[no-untyped-call]
    guard(cache, 10)
    assert dense.is_sliding
    assert not isinstance(dense, RoutedLayer)
    with pytest.raises(UnsupportedCacheError, match="runs without it"):
        dense.update(*[torch.zeros(2, 1, 1, 1)] * 2)
    with pytest.raises(UnsupportedCacheError, match="only its 1 tokens"):
        dense.crop(-2)
    dense.allow_update()
    assert dense.update(*[torch.zeros(2, 1, 1, 1)] * 2)[0].shape[-2] == WINDOW
    assert dense.get_seq_length() == 12


@pytest.mark.parametrize("is_causal", [True, False])
def test_no_mask_in_a_stage(is_causal: bool) -> None:
    """A row sees what came before it, or all that is there; fillers stay hidden. Without them, and causal, None."""
    rows = torch.tensor([[0, 3, 5], [-1, 2, 5]])
    given: Any = {"past": 0, "is_causal": is_causal, "mask_format": "boolean", "dtype": torch.float32}
    assert prefill_mask(None, rows[:1], rows[:1], has_fillers=False, **given) is None
    mask = prefill_mask(None, rows, rows, has_fillers=True, **given)
    assert mask is not None
    before = torch.ones(3, 3).tril().bool() if is_causal else torch.ones(3, 3).bool()
    assert torch.equal(mask[0, 0], before)
    shown = before & torch.tensor([False, True, True])
    assert torch.equal(mask[1, 0, 1:], shown[1:])


def test_a_mask_with_room_for_more() -> None:
    """Of a sequence that is shorter than it."""
    mask = (torch.arange(8) % 3 == 0)[None, None, None]
    adapted = decode_mask(mask, torch.tensor([[-1, 0, 3, 4, 5]]), 6, mask_format="boolean")
    assert adapted.flatten().tolist() == [False, True, True, False, False]
