"""Promise 3: a row of a batch is the same sample alone, whatever the padding, the neighbours or the attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from attentions import FLASH, FLEX, HUB, attention_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import NAMES, Sample, Tiny
from models import tiny as shared
from oracle import MARGIN, Rules, predict
from support import RULES, any_prompt, any_rules, cache_of, close, enable, generate, kv_lengths, rows, same_decisions


def mixture(tiny: Tiny) -> list[Sample]:
    """One picture, two pictures of different sizes, pictures that touch (Qwen sets a token between), and none."""
    small = (2, 5) if tiny.is_qwen else tiny.grid
    return [
        tiny.prompt(0, 5, tiny.grid, 4),
        tiny.prompt(1, 1, tiny.grid, 2, small, 3),
        tiny.prompt(2, 2, small, int(tiny.is_qwen), small, 6),
        tiny.prompt(3, 9),
    ]


def check_rows(tiny: Tiny, samples: Sequence[Sample], rules: Rules, side: str, *, positions: bool = False) -> None:
    given = tiny.inputs(samples, side, positions=positions)
    expected = [predict(tiny, sample, rules) for sample in samples]
    with enable(tiny, rules) as handle:
        out = tiny.model(**given, use_cache=True)
    if any(
        len(d.kept) < len(sample.visual) for sample, r in zip(samples, expected, strict=True) for d in r.decisions[0]
    ):
        same_decisions(handle.trace, expected)
    for logits, result in zip(rows(out.logits, given["attention_mask"]), expected, strict=True):
        close(logits, result.logits)
    first = rules.layers[0]  # layers below it hold padding too, as in the plain model
    longest = [max(lengths) for lengths in zip(*(r.kv_lengths for r in expected), strict=True)]
    assert kv_lengths(cache_of(out))[first:] == longest[first:]


@pytest.fixture(params=["sdpa", "eager", FLASH, HUB, FLEX])
def attention(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[str]:
    with attention_of(tiny, request.param):
        yield request.param


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", RULES)
def test_rows_equal_the_samples_alone(tiny: Tiny, attention: str, rules: Rules, side: str) -> None:
    check_rows(tiny, mixture(tiny), rules, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_explicit_positions(tiny: Tiny, attention: str, side: str) -> None:
    check_rows(tiny, mixture(tiny), RULES[0], side, positions=True)


def test_alone(tiny: Tiny, attention: str) -> None:
    for sample in mixture(tiny):
        check_rows(tiny, [sample], RULES[0], "left", positions=True)
        check_rows(tiny, [sample], RULES[2], "left")


def test_without_a_mask(tiny: Tiny, attention: str) -> None:
    """Rows of one length, but a different number of visual tokens: fillers although Transformers needs no mask."""
    grids = ((2, 4), (4, 4)) if tiny.is_qwen else (tiny.grid, tiny.grid)
    samples = [tiny.prompt(0, 11, grids[0], 9), tiny.prompt(1, 3, grids[1], 9), tiny.prompt(2, 28)]
    if not tiny.is_qwen:
        samples[0] = tiny.prompt(0, 28)
    given = tiny.inputs(samples)
    assert given["attention_mask"].all()
    if not tiny.is_qwen:
        del given["attention_mask"]
    with enable(tiny, RULES[0]):
        logits = tiny.model(**given).logits
    for row, sample in zip(logits, samples, strict=True):
        close(row, predict(tiny, sample, RULES[0]).logits)


def test_generation_of_every_row(tiny: Tiny, attention: str) -> None:
    samples = mixture(tiny)
    length = max(map(len, samples))
    with enable(tiny, RULES[0]):
        out = generate(tiny, samples, 6)
    for b, sample in enumerate(samples):
        tokens = out.sequences[b, length:].tolist()
        expected = predict(tiny, sample, RULES[0], then=tokens[:-1]).logits[-6:]
        close(torch.stack([step[b] for step in out.logits]), expected)


def test_all_rows_without_pictures_are_plain(tiny: Tiny) -> None:
    samples = [tiny.prompt(0, 9), tiny.prompt(1, 4)]
    plain = tiny.model(**tiny.inputs(samples)).logits
    with enable(tiny, RULES[0]):
        assert torch.equal(tiny.model(**tiny.inputs(samples)).logits, plain)


def test_neighbours_and_padding_change_no_selection(tiny: Tiny) -> None:
    sample, *others = mixture(tiny)
    with enable(tiny, RULES[0]) as handle:
        tiny.model(**tiny.inputs([sample]))
        alone = [stage.kept[0].tolist() for stage in handle.trace]
        for batch in ([sample, *others], [sample, tiny.prompt(9, 40, tiny.grid, 3)], [sample] * 3):
            for side in ("left", "right"):
                tiny.model(**tiny.inputs(batch, side))
                assert [stage.kept[0].tolist() for stage in handle.trace] == alone


def test_ties_go_to_the_lower_index(tiny: Tiny) -> None:
    """Equal states at equal positions have equal scores: a picture of one grey level, scored before RoPE differs."""
    sample = tiny.prompt(0, 3, tiny.grid, 4)
    embeds, positions = tiny.embeds(sample)[None], tiny.positions(sample)
    visual = list(sample.visual)
    embeds[:, visual] = embeds[:, visual[:1]]
    positions = positions.clone()
    positions[..., visual] = positions[..., visual[:1]]
    given = {"inputs_embeds": embeds, "position_ids": positions.unsqueeze(-2)}
    with enable(tiny, Rules((0, 1), (0.5, 0.25))) as handle:
        plan = handle.plan(torch.tensor([sample.ids]))
        with handle.using(plan):
            tiny.model(**given)
    n = len(visual)
    scores = handle.trace[0].scores[0]
    assert torch.equal(scores, scores[:1].expand(n))
    assert handle.trace[0].kept[0].tolist() == list(range(n // 2))


@settings(max_examples=30)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    tiny = shared(name)
    samples = data.draw(st.lists(any_prompt(name), min_size=1, max_size=3))
    rules = data.draw(any_rules())
    side = data.draw(st.sampled_from(["left", "right"]))
    assume(all(predict(tiny, sample, rules).margin > MARGIN for sample in samples))
    check_rows(tiny, samples, rules, side)
