"""The gradient of a routed prefill is that of what it computes, which the oracle computes at full length with masks.

Selections have no gradient: neither here nor there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import CACHE, NAMES, Sample, Tiny
from models import tiny as shared
from oracle import MARGIN, Result, Rules, predict
from support import RULES, any_prompt, any_rules, checkpointing, close, enable, rows
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from turns import first, turn

Gradients = dict[str, Tensor]

MORE_RULES = (
    Rules((1, 3, 6), (0.25, 0.25, 0.75), score_layer_offset=-1),
    Rules((3,), (0.01,), rounding="floor0"),
    Rules((2, 4), (0.5, 0.25), "remove", score_layer_offset=-1),
)
"""Decisions a layer ahead, all tokens deferred to the end, and pruning ranked a layer ahead."""


def mixture(tiny: Tiny) -> list[Sample]:
    """Unequal pictures, one or two of them, and none."""
    small = (2, 3) if tiny.is_qwen else tiny.grid
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1, tiny.grid, 2, small, 3), tiny.prompt(2, 7)]


@contextmanager
def trained(tiny: Tiny, part: str = "") -> Iterator[None]:
    """Parameters with ``part`` in their name require gradients."""
    for name, parameter in tiny.model.named_parameters():
        parameter.requires_grad_(part in name)
    try:
        yield
    finally:
        tiny.model.requires_grad_(False).zero_grad()


def loss_of(outputs: Sequence[Tensor]) -> Tensor:
    """A number in which every entry of ``outputs``, one tensor (L, ...) for each sample, has a weight of its own."""
    total = torch.zeros(())
    for b, output in enumerate(outputs):
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(b))
        total = total + (output * weights).sum() / output.shape[-1]
    return total


def gradients(tiny: Tiny, loss: Tensor) -> Gradients:
    """Of every parameter that requires one; a part of the model that ran nowhere has zeros."""
    tiny.model.zero_grad()
    loss.backward()
    required = {name: p for name, p in tiny.model.named_parameters() if p.requires_grad}
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in required.items()}


def same(actual: Gradients, expected: Gradients) -> None:
    """Up to the rounding of fp32 in sums of many terms, which is all that there is of a key's bias."""
    assert actual.keys() == expected.keys()
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        tolerance = 1e-5 + 1e-4 * value.abs().max().item()
        torch.testing.assert_close(actual[name], value, rtol=0, atol=tolerance, msg=f"{name}: {{}}".format)


def differs(actual: Gradients, other: Gradients) -> bool:
    return any((actual[name] - value).abs().max() > 1e-2 * value.abs().max() for name, value in other.items())


def routed(tiny: Tiny, samples: Sequence[Sample], rules: Rules, side: str = "left", **settings: Any) -> list[Tensor]:
    """Logits of the valid tokens of each sample."""
    inputs = tiny.inputs(samples, side)
    with enable(tiny, rules) as handle:
        logits = tiny.model(**inputs, **settings).logits
        assert handle.stats().prefills == 1
    return rows(logits, inputs["attention_mask"])


def predicted(tiny: Tiny, samples: Sequence[Sample], rules: Rules) -> list[Result]:
    return [predict(tiny, sample, rules) for sample in samples]


def check(tiny: Tiny, samples: Sequence[Sample], rules: Rules, side: str = "left", **settings: Any) -> Gradients:
    """Logits and gradients of a batch are those of the oracle."""
    results = predicted(tiny, samples, rules)
    logits = routed(tiny, samples, rules, side, **settings)
    for actual, result in zip(logits, results, strict=True):
        close(actual, result.logits)
    expected = gradients(tiny, loss_of([result.logits for result in results]))
    same(gradients(tiny, loss_of(logits)), expected)
    return expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rules", [*RULES, *MORE_RULES])
def test_of_every_parameter(tiny: Tiny, rules: Rules, side: str) -> None:
    """The vision tower's and the embeddings' too: they come through what was deferred and what was not."""
    samples = mixture(tiny)
    with trained(tiny):
        expected = check(tiny, samples, rules, side)
        dense = gradients(
            tiny, loss_of(rows(tiny.model(**tiny.inputs(samples)).logits, tiny.inputs(samples)["attention_mask"]))
        )
    assert differs(expected, dense)


def test_with_renumbered_positions() -> None:
    tiny = shared("llava-gqa")
    with trained(tiny):
        check(tiny, mixture(tiny), Rules((2, 5), (0.5, 0.25), "remove", position_mode="renumbered"))


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("name", NAMES)
def test_any(name: str, data: st.DataObject) -> None:
    tiny = shared(name)
    rules = data.draw(any_rules())
    samples = data.draw(st.lists(any_prompt(name, pictures=(1, 2)), min_size=1, max_size=3))
    with trained(tiny):
        with torch.no_grad():
            assume(all(result.margin > MARGIN for result in predicted(tiny, samples, rules)))
        check(tiny, samples, rules, data.draw(st.sampled_from(["left", "right"])))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize(
    "part",
    ["layers.7.", "layers.5.self_attn.k_proj.weight", "layers.0.mlp.down_proj.weight", "embed_tokens", "projector"],
)
def test_of_a_part(tiny: Tiny, rules: Rules, part: str) -> None:
    """Of frozen layers below, nothing is recorded before the first decision, and still all that follows is."""
    part = "merger" if part == "projector" and tiny.is_qwen else part
    with trained(tiny, part):
        check(tiny, mixture(tiny), rules)


def test_of_keys_that_also_rank(tiny: Tiny) -> None:
    """Ranking uses the keys of layer 4 and adds nothing to their gradient."""
    with trained(tiny, "layers.4.self_attn.k_proj"):
        check(tiny, mixture(tiny), Rules((4,), (0.3,)))


def test_of_hidden_states(tiny: Tiny) -> None:
    """They are at logical length, and deferred tokens are among them."""
    samples, rules = mixture(tiny), RULES[0]
    inputs = tiny.inputs(samples)
    with trained(tiny):
        for layer in (2, 3, 5, 7, 8):
            expected = [result.hidden[layer] for result in predicted(tiny, samples, rules)]
            with enable(tiny, rules):
                states = tiny.model(**inputs, output_hidden_states=True).hidden_states[layer]
            actual = rows(states, inputs["attention_mask"])
            same(gradients(tiny, loss_of(actual)), gradients(tiny, loss_of(expected)))


@pytest.mark.parametrize("rules", RULES)
def test_of_embeddings(tiny: Tiny, rules: Rules) -> None:
    """Nothing but the input requires gradients: what soft prompts and saliency maps need."""
    samples = mixture(tiny)
    inputs = tiny.inputs(samples, positions=True)
    mask = inputs["attention_mask"].bool()
    embeds = [tiny.embeds(sample).requires_grad_() for sample in samples]
    expected = loss_of([predict(tiny, s, rules, embeds=e).logits for s, e in zip(samples, embeds, strict=True)])
    given_rows = torch.zeros(*mask.shape, embeds[0].shape[1])
    given_rows[mask] = torch.cat([e.detach() for e in embeds])
    given_rows.requires_grad_()
    with enable(tiny, rules) as handle, handle.using(handle.plan(inputs["input_ids"], inputs["attention_mask"])):
        logits = tiny.model(
            inputs_embeds=given_rows, attention_mask=inputs["attention_mask"], position_ids=inputs["position_ids"]
        ).logits
    actual = loss_of(rows(logits, mask))
    close(actual, expected)
    (of_rows,) = torch.autograd.grad(actual, given_rows)
    assert not of_rows[~mask].any()
    for row, gradient in zip(rows(of_rows, mask), torch.autograd.grad(expected, embeds), strict=True):
        same({"embeds": row}, {"embeds": gradient})


def test_a_bypassing_token_passes_its_gradient_on(tiny: Tiny) -> None:
    """From behind the last layer to where it was deferred, with nothing added and nothing lost."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    ends: list[Tensor] = []
    note = tiny.model.model.language_model.norm.register_forward_pre_hook(lambda module, args: ends.append(args[0]))
    try:
        with trained(tiny), enable(tiny, Rules((3,), (0.25,))) as handle:
            before = tiny.model(**tiny.inputs([sample]), output_hidden_states=True).hidden_states[3]
            assert handle.trace is not None
            kept = [sample.visual[i] for i in handle.trace[0].kept[0].tolist()]
            weights = torch.randn(64)
            for token in sample.visual:
                (gradient,) = torch.autograd.grad(ends[0][0, token] @ weights, before, retain_graph=True)
                straight = torch.zeros_like(gradient)
                straight[0, token] = weights
                assert torch.equal(gradient, straight) == (token not in kept)
    finally:
        note.remove()


def test_two_prefills_in_one_graph(tiny: Tiny) -> None:
    """Their rows are not in one place, nor in that of a prefill that comes before the backward pass."""
    first, second, between = mixture(tiny)[:1], mixture(tiny)[1:2], mixture(tiny)
    with trained(tiny):
        results = [predict(tiny, s, RULES[0]).logits for s in (*first, *second)]
        expected = gradients(tiny, loss_of(results))
        with enable(tiny, RULES[0]):
            logits = [tiny.model(**tiny.inputs(samples)).logits[0] for samples in (first, second)]
            with torch.no_grad():
                tiny.model(**tiny.inputs(between))
            same(gradients(tiny, loss_of(logits)), expected)


def test_accumulated(tiny: Tiny) -> None:
    """Backward of one prefill during the life of another's graph."""
    first, second = mixture(tiny)[:2]
    with trained(tiny), enable(tiny, RULES[0]):
        losses = [loss_of([tiny.model(**tiny.inputs([sample])).logits[0]]) for sample in (first, second)]
        alone = [gradients(tiny, loss) for loss in losses]
        together = [loss_of([tiny.model(**tiny.inputs([sample])).logits[0]]) for sample in (first, second)]
        same(gradients(tiny, together[0] + together[1]), {n: alone[0][n] + alone[1][n] for n in alone[0]})


def test_with_labels(tiny: Tiny) -> None:
    """A step of training: the answer is not part of the question by which tokens are ranked."""
    sample = tiny.prompt(0, 5, tiny.grid, 9)
    inputs, answer = tiny.inputs([sample]), 4
    labels = inputs["input_ids"].clone()
    labels[:, :-answer] = -100
    with trained(tiny):
        result = predict(tiny, sample, RULES[0], query=len(sample) - answer - 1)
        expected = torch.nn.functional.cross_entropy(result.logits[-answer - 1 : -1], labels[0, -answer:])
        with enable(tiny, RULES[0]):
            loss = tiny.model(**inputs, labels=labels).loss
        close(loss, expected)
        same(gradients(tiny, loss), gradients(tiny, expected))


@pytest.mark.parametrize("rules", [RULES[0], MORE_RULES[0], MORE_RULES[2]])
def test_of_a_turn_that_chooses_again(tiny: Tiny, rules: Rules) -> None:
    """Through the states that the cache keeps, to the picture of the first turn."""
    said, new = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 6)
    with trained(tiny):
        with enable(tiny, rules, reopens=True):
            logits = turn(tiny, first(tiny, [said]), [said], [new])[0]
        expected = predict(tiny, said + new, rules).logits[-6:]
        close(logits, expected)
        of_oracle = gradients(tiny, loss_of([expected]))
        same(gradients(tiny, loss_of([logits])), of_oracle)


# --- gradient checkpointing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rules", [*RULES, MORE_RULES[0]])
def test_under_gradient_checkpointing(tiny: Tiny, rules: Rules, use_reentrant: bool) -> None:
    """Layers run again in the backward pass, on the rows that were chosen in the forward one."""
    tiny = checkpointing(tiny, use_reentrant=use_reentrant)
    with trained(tiny):
        check(tiny, mixture(tiny), rules)


def test_no_states_are_kept_under_gradient_checkpointing(tiny: Tiny) -> None:
    """Transformers then lets no layer store anything, whatever cache it was given."""
    tiny, rules = checkpointing(tiny), RULES[0]
    with trained(tiny), enable(tiny, rules, reopens=True):
        cache = DynamicCache()
        logits = tiny.model(**tiny.inputs(mixture(tiny)[:1]), use_cache=True, **{CACHE: cache}).logits
    close(logits[0], predict(tiny, mixture(tiny)[0], rules).logits)
    assert cache.get_seq_length() == 0


def test_of_a_part_under_gradient_checkpointing(tiny: Tiny) -> None:
    tiny = checkpointing(tiny)
    with trained(tiny, "layers.5.self_attn.k_proj.weight"):
        check(tiny, mixture(tiny), RULES[0])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_whole_call_under_checkpoint(tiny: Tiny, use_reentrant: bool) -> None:
    """The prefill itself runs again, and may not stay behind when autograd stops it halfway."""
    sample, rules = mixture(tiny)[0], RULES[0]
    inputs = tiny.inputs([sample])
    embeds = tiny.embeds(sample)[None].requires_grad_()

    def call(states: Tensor) -> Any:
        given = {"attention_mask": inputs["attention_mask"], "position_ids": tiny.positions(sample).unsqueeze(-2)}
        return tiny.model(inputs_embeds=states, **given, use_cache=False).logits

    with trained(tiny, "language_model.layers"):
        expected = gradients(tiny, loss_of([predict(tiny, sample, rules).logits]))
        with enable(tiny, rules) as handle, handle.using(handle.plan(inputs["input_ids"])):
            logits = checkpoint(call, embeds, use_reentrant=use_reentrant)
            same(gradients(tiny, loss_of([logits[0]])), expected)
