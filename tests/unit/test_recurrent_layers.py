"""Cache layers that keep a state, in a cache of which other layers lack rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, LinearAttentionLayer

from reroute.errors import UnsupportedCacheError
from reroute.transformers.cache import GuardedRecurrentLayer, RowPositions, check_cache, check_whole, guard, route_layer

KERNEL, FLOOR = 3, 6
State: Any = LinearAttentionLayer
Rows: Any = DynamicLayer


def columns(count: int) -> Tensor:
    return torch.arange(2.0 * count).view(2, 1, count)


def routed(*, has_recurrent_state: bool, records: bool = False) -> Any:
    """A cache of a state, rows, a state and rows, of 8 tokens and of 5 of them; text from the 7th on."""
    cache: Any = DynamicCache()
    cache.layer_class_to_replicate = None
    cache.layers = [State(), Rows(), State(), Rows()]
    if records:
        cache.activate_past_recording()
    for layer, count in zip(cache.layers, (8, 8, 5, 5), strict=True):
        if isinstance(layer, LinearAttentionLayer):
            layer.update_conv_state(columns(count), conv_kernel_size=KERNEL)
            if has_recurrent_state:
                layer.update_recurrent_state(torch.ones(2, 1, 2, 2))
        else:
            layer.update(*[torch.zeros(2, 1, count, 1)] * 2)
    positions = torch.tensor([[0, 1, 3, 6, 7]]).expand(2, -1)
    route_layer(cache, 3, RowPositions(positions, 8, FLOOR, False, None, (2,)))
    guard(cache, FLOOR)
    return cache


def test_only_forwards_that_are_adapted_see_a_state() -> None:
    cache = routed(has_recurrent_state=True)
    for layer in (0, 2):
        assert type(cache.layers[layer]) is GuardedRecurrentLayer
        with pytest.raises(UnsupportedCacheError, match="this forward runs without it"):
            cache.has_previous_state(layer, state_idx=0)
        with pytest.raises(UnsupportedCacheError, match="this forward runs without it"):
            cache.update_conv_state(columns(1), layer, conv_kernel_size=KERNEL)
        cache.layers[layer].allow_update()
        assert cache.has_previous_state(layer, state_idx=0)
        cache.layers[layer].forbid_update()
        with pytest.raises(UnsupportedCacheError, match="this forward runs without it"):
            cache.has_previous_state(layer)
    assert cache.get_seq_length() == 8
    check_whole(cache, 4)


def test_states_that_go_back() -> None:
    """Rows for a convolution do, if they were recorded; and nothing changes where some layer would refuse."""
    cache = routed(has_recurrent_state=False, records=True)
    with pytest.raises(UnsupportedCacheError, match="only its 2 tokens"):
        cache.crop(-3)
    assert cache.layers[0].conv_states[0].shape[-1] == 8
    cache.crop(-2)
    assert torch.equal(cache.layers[0].conv_states[0], columns(8)[..., 3:6])
    assert torch.equal(cache.layers[2].conv_states[0], columns(5)[..., :3])
    assert cache.get_seq_length() == FLOOR
    check_whole(cache, 4)
    with pytest.raises(UnsupportedCacheError, match="they do not go back"):
        routed(has_recurrent_state=True, records=True).crop(-1)
    with pytest.raises(RuntimeError, match="does not track past states"):
        routed(has_recurrent_state=False).crop(-1)


def test_samples_that_are_reordered() -> None:
    cache = routed(has_recurrent_state=True)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[2].conv_states[0][0], columns(5)[1, :, 2:])


def test_reset() -> None:
    layer: Any = routed(has_recurrent_state=True).layers[0]
    layer.reset()
    assert type(layer) is LinearAttentionLayer
    assert vars(layer).keys() == vars(State()).keys()
    assert layer.has_previous_state == {0: False}


def test_an_empty_state() -> None:
    """Of a layer that has not run, as under gradient checkpointing, there is nothing to guard."""
    cache: Any = DynamicCache()
    cache.layers = [State(), Rows()]
    cache.layers[1].update(*[torch.zeros(1, 1, 4, 1)] * 2)
    guard(cache, 4)
    assert type(cache.layers[0]) is LinearAttentionLayer


def test_layers_of_another_kind() -> None:
    cache = routed(has_recurrent_state=True)
    check_cache(cache, range(4), lambda _: False, lambda layer: layer in (0, 2))
    with pytest.raises(UnsupportedCacheError, match="DynamicLayer cannot"):
        check_cache(cache, range(4), lambda _: False, lambda layer: layer < 3)
