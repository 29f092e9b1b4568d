"""Promise 4: outputs have logical length: logits, losses, hidden states, in every form they can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Sample, Tiny
from oracle import Result, Rules, predict
from support import RULES, close, enable, rows, same_decisions
from torch import Tensor

IGNORED = -100


def labelled(tiny: Tiny, parts: Sequence[tuple[Sample, bool]]) -> tuple[Sample, list[int]]:
    """A sample of several parts, with labels on those marked True."""
    whole, labels = Sample(()), []
    for part, has_labels in parts:
        whole += part
        labels += list(part.ids) if has_labels else [IGNORED] * len(part)
    return whole, labels


def padded(labels: Sequence[list[int]], side: str) -> Tensor:
    length = max(map(len, labels))
    missing = [[IGNORED] * (length - len(row)) for row in labels]
    return torch.tensor([m + row if side == "left" else row + m for m, row in zip(missing, labels, strict=True)])


def loss_of(results: Sequence[Result], labels: Sequence[list[int]]) -> Tensor:
    logits = torch.cat([result.logits[:-1] for result in results])
    return F.cross_entropy(logits, torch.tensor([x for row in labels for x in row[1:]]), ignore_index=IGNORED)


def check_loss(
    tiny: Tiny, samples: Sequence[Sample], labels: Sequence[list[int]], queries: Sequence[int | None], side: str
) -> None:
    expected = [predict(tiny, s, RULES[0], query=q) for s, q in zip(samples, queries, strict=True)]
    given = tiny.inputs(samples, side)
    with enable(tiny, RULES[0]) as handle:
        output = tiny.model(**given, labels=padded(labels, side))
        same_decisions(handle.trace, expected)
        for logits, result in zip(rows(output.logits, given["attention_mask"]), expected, strict=True):
            close(logits, result.logits)
        close(output.loss, loss_of(expected, labels))
        # Labels are forgotten with their forward.
        tiny.model(**given)
        same_decisions(handle.trace, [predict(tiny, sample, RULES[0]) for sample in samples])


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_an_answer(tiny: Tiny, side: str) -> None:
    """The token before the answer decides, as when the answer is generated; answers must not rank the picture."""
    question, answer = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 6)
    short, reply = tiny.prompt(2, 2, tiny.grid, 3), tiny.prompt(3, 2)
    words, last = tiny.prompt(4, 3), tiny.prompt(5, 5)
    cases = [labelled(tiny, [(a, False), (b, True)]) for a, b in ((question, answer), (short, reply), (words, last))]
    samples, labels = zip(*cases, strict=True)
    check_loss(tiny, samples, labels, [len(question) - 1, len(short) - 1, None], side)


def test_loss_of_two_answers(tiny: Tiny) -> None:
    """The first answer's question decides for the prompt."""
    asked, words = tiny.prompt(0, 5, tiny.grid, 4), [tiny.prompt(seed, 3) for seed in (1, 2, 3)]
    sample, labels = labelled(tiny, [(asked, False), (words[0], True), (words[1], False), (words[2], True)])
    check_loss(tiny, [sample], [labels], [len(asked) - 1], "left")


def test_loss_of_answers_before_and_after_the_picture(tiny: Tiny) -> None:
    """An answer from before the picture says nothing about it: the one after it does."""
    parts = [tiny.prompt(0, 3), tiny.prompt(1, 3), tiny.prompt(2, 2, tiny.grid, 4), tiny.prompt(3, 5)]
    sample, labels = labelled(tiny, [(parts[0], False), (parts[1], True), (parts[2], False), (parts[3], True)])
    check_loss(tiny, [sample], [labels], [sum(map(len, parts[:3])) - 1], "left")


def test_labels_before_the_picture_only(tiny: Tiny) -> None:
    parts = [tiny.prompt(0, 4), tiny.prompt(1, 2, tiny.grid, 4)]
    sample, labels = labelled(tiny, [(parts[0], True), (parts[1], False)])
    check_loss(tiny, [sample], [labels], [None], "left")


def test_no_token_is_labelled(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with enable(tiny, RULES[0]) as handle:
        output = tiny.model(**tiny.inputs([sample]), labels=torch.full((1, len(sample)), IGNORED))
    expected = predict(tiny, sample, RULES[0])
    close(output.logits[0], expected.logits)
    same_decisions(handle.trace, [expected])


def test_labels_are_forgotten_after_an_exception(tiny: Tiny) -> None:
    sample = tiny.prompt(0, 5, tiny.grid, 8)
    labels = torch.tensor([sample.ids])
    labels[:, :-4] = IGNORED
    with enable(tiny, RULES[0]) as handle:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny.model.lm_head, "forward", lambda x: x @ x)
            with pytest.raises(RuntimeError):
                tiny.model(**tiny.inputs([sample]), labels=labels)
        tiny.model(**tiny.inputs([sample]))
        same_decisions(handle.trace, [predict(tiny, sample, RULES[0])])


# --- hidden states and forms of output ----------------------------------------------------------------------------


def samples(tiny: Tiny) -> list[Sample]:
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 1, tiny.grid, 2, tiny.grid, 3), tiny.prompt(2, 9)]


@pytest.mark.parametrize("rules", [*RULES, Rules((1, 7), (0.3, 0.5), score_layer_offset=-1)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states(tiny: Tiny, rules: Rules, side: str) -> None:
    """Input of every layer, and the normed output of the last: a deferred token shows its latest state."""
    given = tiny.inputs(samples(tiny), side)
    with enable(tiny, rules):
        output = tiny.model(**given, output_hidden_states=True)
    expected = [predict(tiny, sample, rules) for sample in samples(tiny)]
    assert len(output.hidden_states) == tiny.num_layers + 1
    for layer, states in enumerate(output.hidden_states):
        for state, result in zip(rows(states, given["attention_mask"]), expected, strict=True):
            close(state, result.hidden[layer])


def test_hidden_states_by_configuration(tiny: Tiny) -> None:
    text = tiny.model.config.get_text_config()
    given = tiny.inputs(samples(tiny)[:1])
    expected = predict(tiny, samples(tiny)[0], RULES[0])
    text.output_hidden_states = True
    try:
        with enable(tiny, RULES[0]):
            output = tiny.model(**given)
    finally:
        text.output_hidden_states = False
    for states, ours in zip(output.hidden_states, expected.hidden, strict=True):
        close(states[0], ours)


def test_hidden_states_of_generated_tokens(tiny: Tiny) -> None:
    sample = samples(tiny)[0]
    with enable(tiny, RULES[0]):
        output = tiny.model.generate(
            **tiny.inputs([sample]), max_new_tokens=3, return_dict_in_generate=True, output_hidden_states=True
        )
    tokens = output.sequences[0, len(sample) :].tolist()
    expected = predict(tiny, sample, RULES[0], then=tokens[:-1])
    assert [states[-1].shape[1] for states in output.hidden_states] == [len(sample), 1, 1]
    for layer in range(tiny.num_layers + 1):
        close(torch.cat([step[layer][0] for step in output.hidden_states]), expected.hidden[layer])


@pytest.mark.parametrize("wanted", [{}, {"output_hidden_states": True}, {"labels": True}], ids=str)
def test_tuples(tiny: Tiny, wanted: dict[str, Any]) -> None:
    sample = samples(tiny)[0]
    given: dict[str, Any] = tiny.inputs([sample])
    if "labels" in wanted:
        labels = torch.tensor([sample.ids])
        labels[:, :-2] = IGNORED
        wanted = {"labels": labels}
    with enable(tiny, RULES[0]):
        by_name = tiny.model(**given, **wanted)
        in_order = tiny.model(**given, **wanted, return_dict=False)
    assert isinstance(in_order, tuple)
    assert len(in_order) == len(by_name.to_tuple())
    for value, expected in zip(in_order, by_name.to_tuple(), strict=True):
        if isinstance(expected, Tensor):
            assert torch.equal(value, expected)
    states = [value for value in in_order if isinstance(value, tuple) and len(value) == tiny.num_layers + 1]
    if "output_hidden_states" in wanted:
        assert all(map(torch.equal, states[0], by_name.hidden_states))


def test_some_logits(tiny: Tiny) -> None:
    sample = samples(tiny)[0]
    expected = predict(tiny, sample, RULES[0]).logits
    with enable(tiny, RULES[0]):
        close(tiny.model(**tiny.inputs([sample]), logits_to_keep=1).logits[0], expected[-1:])
        close(tiny.model(**tiny.inputs([sample]), logits_to_keep=7).logits[0], expected[-7:])
        where = torch.tensor([2, 9, len(sample) - 1])
        close(tiny.model(**tiny.inputs([sample]), logits_to_keep=where).logits[0], expected[where])


def test_the_base_model_alone(tiny: Tiny) -> None:
    """Embedding models call it without the head."""
    sample = samples(tiny)[0]
    with enable(tiny, RULES[0]):
        states = tiny.model.model(**tiny.inputs([sample])).last_hidden_state
    close(states[0], predict(tiny, sample, RULES[0]).hidden[-1])


def test_attentions_stay_compact(tiny: Tiny) -> None:
    """Documented: there are no rows for tokens that did not run."""
    sample = samples(tiny)[0]
    tiny.model.set_attn_implementation("eager")
    try:
        with enable(tiny, RULES[0]):
            attentions = tiny.model(**tiny.inputs([sample]), output_attentions=True).attentions
    finally:
        tiny.model.set_attn_implementation("sdpa")
    lengths = predict(tiny, sample, RULES[0]).kv_lengths
    assert [a.shape[2:] for a in attentions] == [(n, n) for n in lengths]
    for attention in attentions:
        close(attention.sum(-1), torch.ones(attention.shape[:3]))
        assert torch.equal(attention, attention.tril())
