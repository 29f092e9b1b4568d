"""The oracle must be right before it may judge: against a trace computed by hand, and against plain Transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import Tiny
from oracle import Result, Rules, _Turn, predict, run
from support import close
from torch import nn


def toy() -> Any:
    """One head of one dimension: no norm, no RoPE, no MLP, scale 1."""
    same = nn.Identity()
    attn = SimpleNamespace(q_proj=same, k_proj=same, v_proj=same, o_proj=same, head_dim=1, scaling=1.0)
    layer = SimpleNamespace(self_attn=attn, input_layernorm=same, post_attention_layernorm=same, mlp=torch.zeros_like)
    no_turn = lambda x, positions: (torch.ones_like(x), torch.zeros_like(x))
    return SimpleNamespace(layers=[layer] * 3, norm=same, rotary_emb=no_turn)


def trace(action: Any) -> Result:
    states = torch.tensor([-0.7, 0.2, 0.4, -0.9, -0.1, 0.6])[:, None]
    rules = Rules((1, 2), (0.5, 0.5), action)
    return run(toy(), nn.Identity(), states, torch.arange(6), [_Turn(0, 5, [1, 2, 3, 4])], rules)


def column(result: Result, layer: int) -> list[float]:
    return result.hidden[layer][:, 0].tolist()


@pytest.mark.parametrize("action", ["route", "remove"])
def test_first_decision_by_hand(action: str) -> None:
    result = trace(action)
    first = result.decisions[0][0]
    assert column(result, 1) == pytest.approx([-1.4, -0.009609, 0.452119, -1.410972, -0.345453, 0.685708], abs=1e-5)
    assert first.scores.tolist() == pytest.approx([0.180322, 0.247487, 0.068980, 0.143231], abs=1e-5)
    assert first.kept == [0, 1]
    assert column(result, 2) == pytest.approx([-2.8, -0.719057, 0.380092, -1.410972, -0.345453, 0.954869], abs=1e-5)
    assert result.kv_lengths == [6, 4, 4]


def test_second_decision_by_hand_routed() -> None:
    result = trace("route")
    second = result.decisions[0][1]
    assert second.scores.tolist() == pytest.approx([0.091881, 0.262444, 0.047456, 0.131268], abs=1e-5)
    assert second.kept == [1, 3]
    assert column(result, 3) == pytest.approx([-5.6, -0.719057, 0.028997, -1.410972, -1.946942, 1.481187], abs=1e-5)


def test_second_decision_by_hand_removed() -> None:
    result = trace("remove")
    second = result.decisions[0][1]
    assert (second.candidates, second.kept) == ([0, 1], [0, 1])
    assert second.scores.tolist() == pytest.approx([0.111876, 0.319557], abs=1e-5)
    assert [column(result, 3)[i] for i in (0, 1, 2, 5)] == pytest.approx(
        [-5.6, -3.138296, -0.094813, 1.481198], abs=1e-5
    )


def test_nobody_left_out_is_the_plain_model(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 2, tiny.grid, 4)
    result = predict(tiny, sample, Rules((0, 4), (1.0, 1.0)))
    plain = tiny.model(**tiny.inputs([sample]), output_hidden_states=True)
    close(result.logits, plain.logits[0])
    for ours, theirs in zip(result.hidden, plain.hidden_states, strict=True):
        close(ours, theirs[0])


def test_prompts_are_hard_enough(tiny: Tiny) -> None:
    """Attention is far from uniform, selections have margins, deferred tokens return, and routing changes logits."""
    sample = tiny.prompt(1, 5, tiny.grid, 7)
    result = predict(tiny, sample, Rules((2, 4, 6), (0.5, 0.5, 0.25)))
    first, second, third = result.decisions[0]
    assert first.scores.max() > 10 * first.scores.min()
    assert result.margin > 1e-5
    assert set(second.kept) - set(first.kept)
    assert set(third.kept) - set(second.kept)
    plain = tiny.model(**tiny.inputs([sample])).logits[0]
    assert 1 < plain[-1].abs().max() < 20
    assert (result.logits[-1] - plain[-1]).abs().max() > 0.1


def test_counts() -> None:
    assert [Rules((1,), (r,)).count(n, 0) for n, r in ((576, 0.2644), (10, 0.05), (100, 0.29), (0, 0.5))] == [
        152,
        1,
        28,
        0,
    ]
    assert Rules((1,), (0.05,), rounding="floor0").count(10, 0) == 0
    assert [Rules((1,), (r,), rounding="half_even").count(n, 0) for n, r in ((10, 0.25), (6, 0.75))] == [2, 4]
