"""What the tests of routing share: the product on one side, the oracle on the other."""

from __future__ import annotations

import copy
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from models import CACHE, LAYERS, PAD, VOCABULARY, Sample, Tiny, called_before, llava, qwen, tiny
from oracle import MARGIN, Decision, Result, Rules
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import reroute
from reroute.methods import FastV
from reroute.rankers import LastTokenAttention, Ranker, RankInputs, ScoreRanker

RULES = (
    Rules((2, 4, 6), (0.5, 0.25, 0.125)),
    Rules((0, 3), (0.3, 0.6)),
    Rules((2, 4, 6), (0.5, 0.25, 0.125), action="remove"),
    Rules((0, 3, 5), (0.6, 0.3, 0.5), actions=("remove", "route", "route")),
)
"""A pyramid, a growing schedule from layer 0 on, pruning, and routing among what a removal left."""


def tiny_models(*names: str) -> Any:
    """A fixture: the tiny models of these names in turn."""

    @pytest.fixture(name="tiny", params=names)
    def each(request: pytest.FixtureRequest) -> Tiny:
        return tiny(request.param)

    return each


def mixed_batch(tiny: Tiny) -> list[Sample]:
    """One picture, two, none."""
    return [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3, tiny.grid, 2), tiny.prompt(2, 6)]


class NoWaiting(TorchDispatchMode):
    """Refuses operations whose result the host must have before it can go on, and those named ``also``."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __init__(self, *also: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._refused = {*self.WAITING, *also}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        boolean = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        assert name not in self._refused, f"{name} waits for the device"
        assert not boolean, f"{name} with a boolean mask waits for the device"
        return func(*args, **(kwargs or {}))


def never_waits(monkeypatch: pytest.MonkeyPatch, names: Sequence[str], *owners: type) -> list[str]:
    """From now on these methods run under ``NoWaiting``; the list fills with the names of those that ran."""
    ran: list[str] = []

    def guard(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def guarded(*args: Any) -> Any:
            ran.append(name)
            with NoWaiting():
                return original(*args)

        return guarded

    for owner in owners:
        for name in names:
            monkeypatch.setattr(owner, name, guard(getattr(owner, name), name))
    return ran


def schedule(rules: Rules, ranker: Ranker | None = None) -> reroute.Schedule:
    fields = asdict(rules)
    del fields["action"]
    attention = LastTokenAttention(fields.pop("score_layer_offset"))
    ranker = attention if ranker is None else ranker
    return reroute.Schedule(**fields, rankers=(ranker,))


def enable(tiny: Tiny, rules: Rules, ranker: Ranker | None = None, **settings: Any) -> Any:
    model: torch.nn.Module = tiny.model
    return reroute.enable(model, schedule=schedule(rules, ranker), action=rules.action, trace=True, **settings)


def close(actual: Tensor, expected: Tensor) -> None:
    """fp32 against fp32, for logits of size 1 to 10."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def cache_of(output: Any) -> Any:
    return getattr(output, CACHE)


def kv_lengths(cache: Any) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


def rows(values: Tensor, mask: Tensor) -> list[Tensor]:
    """The valid rows of each sample, without padding."""
    return [row[valid.bool()] for row, valid in zip(values, mask, strict=True)]


def same_decisions(trace: Any, expected: Sequence[Result | Sequence[Decision]]) -> None:
    """Selections are exact, wherever the margin rule says that they are defined; scores are close."""
    assert trace is not None
    for b, result in enumerate(expected):
        decisions = result.decisions[0] if isinstance(result, Result) else result
        if not decisions:
            assert all(len(stage.kept[b]) == 0 for stage in trace)
            continue
        assert len(trace) == len(decisions)
        for stage, decision in zip(trace, decisions, strict=True):
            assert decision.margin > MARGIN, "choose another seed: this selection is a matter of rounding"
            assert stage.layer == decision.layer
            assert stage.candidates[b].tolist() == decision.candidates
            close(stage.scores[b], decision.scores)
            assert stage.kept[b].tolist() == decision.kept


def generate(tiny: Tiny, prompts: Sequence[Sample] | dict[str, Tensor], tokens: int = 6, **settings: Any) -> Any:
    """Greedy unless told otherwise; with the raw logits of every step. ``prompts``: samples, or inputs made of them."""
    inputs = prompts if isinstance(prompts, dict) else tiny.inputs(prompts)
    given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **inputs, **settings}
    return tiny.model.generate(**given, max_new_tokens=tokens)


def checkpointing(tiny: Tiny, *, use_reentrant: bool = False) -> Tiny:
    """A copy that is set up for training under gradient checkpointing, which Transformers does not undo wholly."""
    model = copy.deepcopy(tiny.model).train()
    with warnings.catch_warnings(action="ignore"):  # the name that all releases know is deprecated
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return replace(tiny, model=model)


def new_tokens(output: Any, prompt: int, b: int = 0) -> list[int]:
    """What was generated after a prompt of ``prompt`` tokens, padding included."""
    tokens: list[int] = output.sequences[b, prompt:].tolist()
    return tokens


def snapshot(model: Any) -> Any:
    """A module's own attributes and hooks, deep enough to see anything that was added."""

    def frozen(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: id(item) for key, item in value.items()}
        return id(value)

    return {
        name: {key: frozen(value) for key, value in module.__dict__.items() if key != "rope_deltas"}
        for name, module in model.named_modules()
    }


@dataclass(frozen=True)
class Fixed(FastV):
    """A method of one's own with a ratio for each layer."""

    name = "fixed"
    stages: tuple[tuple[int, float], ...] = ((2, 0.5),)

    def schedule(self, num_layers: int, action: Any) -> reroute.Schedule:
        layers, ratios = zip(*self.stages, strict=True)
        return reroute.Schedule(layers, ratios, (self.ranker,))


@dataclass(frozen=True)
class FixedScores(ScoreRanker):
    """Scores that are given: per stage, for each of a sample's visual tokens."""

    table: tuple[tuple[float, ...], ...] = ()
    survivors: tuple[tuple[int, ...], ...] = ()

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        scores = self.table[inputs.stage]
        if self.survivors and inputs.stage:
            scores = tuple(scores[i] for i in self.survivors[inputs.stage - 1])
        assert all(len(hidden) == len(scores) for hidden in inputs.hidden)
        return [torch.tensor(scores) for _ in inputs.hidden]


def fixed(stages: Any, table: Any, survivors: Any = ()) -> Fixed:
    """Given ratios and scores."""
    return Fixed(stages=stages, ranker=FixedScores(table, survivors))


# --- random cases -------------------------------------------------------------------------------------------------


@st.composite
def any_rules(draw: st.DrawFn, *, renumbered: bool = False) -> Rules:
    """Every action, rounding and score layer; ratios may grow under ``route`` only."""
    action: Any = "remove" if renumbered else draw(st.sampled_from(["route", "remove"]))
    offset = draw(st.sampled_from([0, 0, -1]))
    layers = sorted(draw(st.sets(st.integers(-offset, LAYERS - 1), min_size=1, max_size=4)))
    ratio = st.one_of(st.sampled_from([0.0, 0.01, 0.25, 0.5, 1.0]), st.floats(0.02, 1.0))
    keep = draw(st.lists(ratio, min_size=len(layers), max_size=len(layers)))
    some: Any = st.lists(st.sampled_from(["route", "remove"]), min_size=len(layers), max_size=len(layers))
    actions = () if renumbered else tuple(draw(st.one_of(st.just(()), st.just(()), some)))
    left = 1.0
    for stage, does in enumerate(actions or [action] * len(layers)):
        keep[stage] = min(left, keep[stage])
        left = keep[stage] if does == "remove" else left
    rounding = draw(st.sampled_from(["floor", "floor0", "half_even"]))
    positions = "renumbered" if renumbered else "preserved"
    return Rules(tuple(layers), tuple(keep), action, rounding, positions, offset, actions)


@st.composite
def any_prompt(draw: st.DrawFn, name: str, *, pictures: tuple[int, int] = (0, 3)) -> Sample:
    """Text around up to three pictures, which touch in places (never with Qwen2.5-VL); text comes last."""
    model = tiny(name)
    parts: list[Any] = [draw(st.integers(1, 5))]
    for _ in range(draw(st.integers(*pictures))):
        size = draw(st.tuples(st.integers(1, 4), st.integers(1, 5))) if model.is_qwen else model.grid
        parts += [size, draw(st.integers(int(model.is_qwen), 3))]
    return model.prompt(draw(st.integers(0, 10**6)), *parts, draw(st.integers(1, 5)))


# --- calls inside of calls, and calls that are cut short ------------------------------------------------------------

FAMILIES = ("llava", "qwen")
FEW = Rules((1, 3), (0.5, 0.25))
"""For models of five layers: one dense, one that is routed, and two decisions."""


@functools.cache
def small(family: str) -> Tiny:
    """A shared model of five layers, for tests that call it often."""
    return called_before(llava(layers=5) if family == "llava" else qwen(layers=5))


PLACES: dict[str, Callable[[Any], nn.Module]] = {
    "the model": lambda model: model,
    "the base model": lambda model: model.model,
    "the vision tower": lambda model: next(c for n, c in model.model.named_children() if n.startswith("vis")),
    "the embeddings": lambda model: model.get_input_embeddings(),
    "the decoder": lambda model: model.model.language_model,
    "a dense layer": lambda model: model.model.language_model.layers[0],
    "a norm that scores": lambda model: model.model.language_model.layers[1].input_layernorm,
    "a projection that scores": lambda model: model.model.language_model.layers[3].self_attn.k_proj,
    "a routed layer": lambda model: model.model.language_model.layers[2],
    "a layer that decides": lambda model: model.model.language_model.layers[3],
    "attention of the last layer": lambda model: model.model.language_model.layers[4].self_attn,
    "the final norm": lambda model: model.model.language_model.norm,
    "the head": lambda model: model.lm_head,
}
"""Where something may happen in a forward."""


@contextmanager
def inside(module: nn.Module, act: Callable[[], Any], *, after: bool = False) -> Iterator[None]:
    """Do ``act`` once, in the first call of ``module``: before it runs, or ``after``."""
    pending = [act]

    def hook(*_: Any) -> None:
        if pending:
            pending.pop()()

    handle = module.register_forward_hook(hook) if after else module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    assert not pending, "it was never called"


def labels_after(sample: Sample, prompt: int) -> Tensor:
    """(1, L): what comes after ``prompt`` tokens of ``sample`` is the answer."""
    return torch.tensor([[-100] * prompt + list(sample.ids[prompt:])])


def state_of(cache: Any) -> list[Any]:
    """All that the layers of a cache hold."""
    return [
        {name: value.clone() if isinstance(value, Tensor) else value for name, value in _public(layer).items()}
        for layer in cache.layers
    ]


def _public(layer: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(layer).items() if not name.startswith("_")}


def unchanged(cache: Any, before: list[Any]) -> None:
    """Nothing was stored in ``cache`` since ``before``, and nothing taken away."""
    assert len(cache.layers) == len(before)
    for layer, held in zip(cache.layers, before, strict=True):
        assert _public(layer).keys() == held.keys()
        for name, value in _public(layer).items():
            assert torch.equal(value, held[name]) if isinstance(value, Tensor) else value == held[name]


# --- refusals -----------------------------------------------------------------------------------------------------


def refuses(
    tiny: Tiny,
    kind: type[Exception],
    message: str,
    call: Callable[[], Any],
    rules: Rules = RULES[0],
    **settings: Any,
) -> None:
    """``call`` raises; the model, its pool and the next forward are as if it had not been made."""
    sample = tiny.prompt(0, 5, tiny.grid, 4)
    with enable(tiny, rules, **settings) as handle:
        expected = tiny.model(**tiny.inputs([sample])).logits if "pool" not in settings else None
        count, before = handle.stats().prefills, snapshot(tiny.model)
        with pytest.raises(kind, match=message):
            call()
        assert handle.stats().prefills == count
        assert snapshot(tiny.model) == before
        if expected is not None:
            assert torch.equal(tiny.model(**tiny.inputs([sample])).logits, expected)


def frames(call: Callable[[], Any]) -> Counter[str]:
    """How often each function of the product is entered in ``call``; generators at each of their values."""
    counts: Counter[str] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event == "call" and module.startswith("reroute"):
            counts[f"{module}.{frame.f_code.co_name}"] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return counts


def assistant_model() -> Any:
    """A tiny text model that drafts three tokens."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    assistant: Any = LlamaForCausalLM(config)
    assistant.eval().requires_grad_(False)
    assistant.generation_config.update(pad_token_id=PAD, eos_token_id=None, num_assistant_tokens=3)
    return assistant
