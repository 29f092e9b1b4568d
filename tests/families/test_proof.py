"""What a family says and a layer does not do is refused, and the sentence names the fact."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_types import ONE, batch
from tiny_types import TinyType, build
from torch import Tensor, nn
from transformers.models.llama import modeling_llama
from transformers.models.qwen3 import modeling_qwen3

import reroute
from reroute.errors import RerouteError, UnsupportedModelError
from reroute.transformers import ModelAdapter, adapters
from reroute.transformers.adapters import ROUTED, adapter_of
from reroute.transformers.adapters.facts import layer_facts
from reroute_kernels import AttentionSpec, RopeTables

SCHEDULE = reroute.Schedule((2, 4), (0.5, 0.25))


@pytest.fixture
def llava() -> TinyType:
    """One of its own, as facts are kept for as long as a model lives."""
    return copy.deepcopy(build("llava"))


@pytest.fixture
def normed() -> TinyType:
    """With norms of query and key heads."""
    return copy.deepcopy(build("lighton_ocr"))


def state(model: Any) -> Any:
    """Classes and attributes of all modules, deep enough to see what was added."""

    def shallow(value: Any) -> Any:
        return {key: id(item) for key, item in value.items()} if isinstance(value, dict) else id(value)

    return {
        name: (type(module), {key: shallow(value) for key, value in vars(module).items()})
        for name, module in model.named_modules()
    }


def refused(tiny: TinyType, sentence: str, layer: int = 2) -> None:
    """``enable`` says so, and the model is as it was."""
    before = state(tiny.model)
    with pytest.raises(UnsupportedModelError, match=f"(?s)Decoder layer {layer} .*{sentence}"):
        reroute.enable(tiny.model, schedule=SCHEDULE)
    assert state(tiny.model) == before


# --- a family file that is wrong ------------------------------------------------------------------------------------


class Scaled(ModelAdapter):
    def attention_spec(self, layer: int) -> AttentionSpec:
        spec = super().attention_spec(layer)
        return spec._replace(scale=spec.scale * 1.001)


class Interleaved(ModelAdapter):
    def attention_spec(self, layer: int) -> AttentionSpec:
        return super().attention_spec(layer)._replace(rope="interleaved")


class Unnormed(ModelAdapter):
    def normalise(self, layer: int, rows: Tensor) -> Tensor:
        return rows


class GemmaNormed(ModelAdapter):
    """Norms that multiply by one more than their weight."""

    def normalise(self, layer: int, rows: Tensor) -> Tensor:
        norm = super().input_norm(layer)
        assert norm is not None
        return norm._replace(weight=1 + norm.weight)(rows)


class WithoutKeyNorm(ModelAdapter):
    def attention_spec(self, layer: int) -> AttentionSpec:
        return super().attention_spec(layer)._replace(key_norm=None)


class WithoutQueryNorm(ModelAdapter):
    def project_own(self, layer: int, normed: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        projected = self._attention(layer).q_proj(normed[tables.query_rows])
        query = projected.unflatten(-1, (-1, self.facts(layer).head_dim))
        return query, super().project_own(layer, normed, tables)[1]


class SwappedHeads(ModelAdapter):
    """Groups of query heads that are not those of their keys."""

    def project_own(self, layer: int, normed: Tensor, tables: RopeTables) -> tuple[Tensor, Tensor]:
        query, keys = super().project_own(layer, normed, tables)
        return query.roll(1, dims=1), keys


LIES: dict[type[ModelAdapter], str] = {
    Scaled: "scores are not",
    Interleaved: "rotated queries are not",
    Unnormed: "the norm before attention",
    GemmaNormed: "the norm before attention",
    WithoutKeyNorm: "keys before their rotation are not",
    WithoutQueryNorm: "queries before their rotation are not",
    SwappedHeads: "queries before their rotation are not",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_family_that_is_wrong(normed: TinyType, lie: type[ModelAdapter], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(adapters.FAMILIES, "lighton_ocr", lie)
    refused(normed, LIES[lie])


# --- a layer that does something else -------------------------------------------------------------------------------


def attention(change: Callable[..., Any], module: Any = modeling_llama) -> Callable[[TinyType, Any], None]:
    """``change`` rewrites what layer 2 hands to its attention function."""

    def plant(tiny: TinyType, patch: pytest.MonkeyPatch) -> None:
        kind = type(tiny.layers[2].self_attn)

        class Odd(kind):  # type: ignore[misc,valid-type]
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                interface = module.ALL_ATTENTION_FUNCTIONS

                class Changed:
                    def get_interface(self, *names: Any) -> Any:
                        return functools.partial(change, interface.get_interface(*names), kwargs)

                with pytest.MonkeyPatch.context() as inner:
                    inner.setattr(module, "ALL_ATTENTION_FUNCTIONS", Changed())
                    return super().forward(*args, **kwargs)

        tiny.layers[2].self_attn.__class__ = Odd

    return plant


def scaled_by_position(
    plain: Any, given: Any, of: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any
) -> Any:
    """As Ministral 3 does it: by 1 below 16384."""
    scale = 1 + 0.1 * torch.log1p((given["position_ids"] // 16384).float())
    return plain(of, q * scale[:, None, :, None], k, v, mask, **options)


def capped(plain: Any, given: Any, of: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    return plain(of, q, k, v, mask, softcap=50.0, **options)


def other_scale(plain: Any, given: Any, of: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    return plain(of, q, k, v, mask, **{**options, "scaling": 1.0})


def other_mask(plain: Any, given: Any, of: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    return plain(of, q, k, v, torch.zeros_like(mask), **options)


def noisy_queries(plain: Any, given: Any, of: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    return plain(of, q * 1.0005, k, v, mask, **options)


def noisy_keys(plain: Any, given: Any, of: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
    return plain(of, q, k * 1.0005, v, mask, **options)


def windowed(tiny: TinyType, patch: pytest.MonkeyPatch) -> None:
    """A window that is far longer than the dry run."""

    def window(plain: Any, given: Any, of: Any, *tensors: Any, **options: Any) -> Any:
        return plain(of, *tensors, sliding_window=4096, **options)

    attention(window)(tiny, patch)


def interleaved(tiny: TinyType, patch: pytest.MonkeyPatch) -> None:
    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return q * cos[:, None] + q.roll(1, -1) * sin[:, None], k * cos[:, None] + k.roll(1, -1) * sin[:, None]

    patch.setattr(modeling_llama, "apply_rotary_pos_emb", rotate)


def counting(tiny: TinyType, patch: pytest.MonkeyPatch) -> None:
    """As Llama 4 does it: its scale is 1 for the first 8192 rows that are there."""
    kind = type(tiny.layers[2].self_attn)

    class Counting(kind):  # type: ignore[misc,valid-type]
        def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            rows = torch.arange(hidden_states.shape[1]) // 8192
            return super().forward(hidden_states * (1 + rows)[:, None], *args, **kwargs)

    tiny.layers[2].self_attn.__class__ = Counting


def convolving(tiny: TinyType, patch: pytest.MonkeyPatch) -> None:
    tiny.layers[2].mlp.mix = nn.Conv1d(32, 32, 3, groups=32)


def unknown_before(tiny: TinyType, patch: pytest.MonkeyPatch) -> None:
    class Before(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm, self.matrix = norm, nn.Linear(32, 32)

        def forward(self, rows: Tensor) -> Tensor:
            result: Tensor = self.norm(rows) + 0 * self.matrix(rows)
            return result

    tiny.layers[2].input_layernorm = Before(tiny.layers[2].input_layernorm)


FAULTS: dict[str, tuple[Callable[[TinyType, Any], None], str]] = {
    "a scale by position": (attention(scaled_by_position), "neither what 'q_proj' returns nor a norm"),
    "a soft cap": (attention(capped), "also gets softcap"),
    "another mask": (attention(other_mask), "gets another mask"),
    "queries that are a little longer": (attention(noisy_queries), "neither what 'q_proj' returns nor a norm"),
    "keys that are a little longer": (attention(noisy_keys), "neither what 'k_proj' returns nor a norm"),
    "another rotation": (interleaved, "rotates queries and keys in another way"),
    "rows that are counted": (counting, "counts the rows that are present"),
    "a convolution": (convolving, "has a convolution"),
    "matrices before attention": (unknown_before, "calls Before before"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_does_something_else(llava: TinyType, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, sentence = FAULTS[fault]
    plant(llava, monkeypatch)
    refused(llava, sentence)


def test_a_scale_that_only_the_attention_function_is_told(llava: TinyType, monkeypatch: pytest.MonkeyPatch) -> None:
    attention(other_scale)(llava, monkeypatch)
    with reroute.enable(llava.model, schedule=SCHEDULE):
        assert adapter_of(llava.model).attention_spec(2).scale == 1.0 != llava.layers[2].self_attn.scaling


def test_a_window_that_only_the_attention_function_knows(llava: TinyType, monkeypatch: pytest.MonkeyPatch) -> None:
    windowed(llava, monkeypatch)
    with pytest.raises(RerouteError, match=r"Layers \[2\] use sliding-window attention"):
        reroute.enable(llava.model, schedule=SCHEDULE)


def test_layers_that_see_later_tokens_and_others(llava: TinyType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all do, a missing mask means that in all."""
    monkeypatch.setattr(llava.layers[4].self_attn, "is_causal", False)
    with pytest.raises(UnsupportedModelError, match="some layers of LlamaModel see later tokens and others do not"):
        reroute.enable(llava.model, schedule=SCHEDULE)
    for layer in llava.layers:
        monkeypatch.setattr(layer.self_attn, "is_causal", False)
    reroute.enable(llava.model, schedule=SCHEDULE).disable()


def test_a_layer_that_changes_while_it_is_looked_at(llava: TinyType) -> None:
    """As one does whose routing ends in another thread."""

    class Restless:
        @property  # type: ignore[misc]
        def __class__(self) -> type:  # asked for by isinstance
            vars(llava.layers[2])[f"another {len(vars(llava.layers[2]))}"] = None
            return Restless

    vars(llava.layers[2])["restless"] = Restless()
    reroute.enable(llava.model, schedule=SCHEDULE).disable()


@pytest.mark.parametrize("fault", ["none", "a mean", "a hook", "longer tables"])
def test_norms_behind_the_rotation(normed: TinyType, fault: str) -> None:
    """HunYuan's order, in which only norms that keep lengths can be taken for what they are before."""
    plain = modeling_qwen3.apply_rotary_pos_emb
    of = normed.layers[2].self_attn
    norms = of.q_norm, of.k_norm
    kind = type(of)

    class Behind(kind):  # type: ignore[misc,valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            after = self.q_after, self.k_after
            with pytest.MonkeyPatch.context() as patch:
                turned = lambda *tensors: tuple(norm(x) for norm, x in zip(after, plain(*tensors), strict=True))
                patch.setattr(modeling_qwen3, "apply_rotary_pos_emb", turned)
                return super().forward(*args, **kwargs)

    of.q_norm, of.k_norm = nn.Identity(), nn.Identity()
    of.q_after, of.k_after = norms
    of.__class__ = Behind
    if fault == "a mean":
        of.q_after = nn.LayerNorm(8)
        refused(normed, "rotates queries and keys in another way")
    elif fault == "longer tables":  # of YaRN; the norms divide it out again, and ours would not
        normed.text.rotary_emb.attention_scaling = 1.3
        refused(normed, "scores are not what")
    else:
        with reroute.enable(normed.model, schedule=SCHEDULE) as handle:
            if fault == "a hook":
                of.k_after.register_forward_hook(lambda *_: None)
                given = batch(normed, ONE)
                with handle.using(handle.plan(given["input_ids"])), pytest.raises(RerouteError, match="have hooks or"):
                    normed.model(**given)


# --- a proof leaves nothing behind ----------------------------------------------------------------------------------


def test_a_proof_reads_no_weight_and_draws_no_number(llava: TinyType) -> None:
    """As it has to, for weights that are elsewhere."""
    for module in (*llava.layers, llava.text.rotary_emb):
        module.to("meta")
    numbers, before = torch.get_rng_state(), state(llava.model)
    with reroute.enable(llava.model, schedule=SCHEDULE):
        pass
    assert torch.equal(torch.get_rng_state(), numbers)
    assert state(llava.model) == before


def test_rotary_frequencies_that_grow_with_positions_stay(llava: TinyType) -> None:
    config = copy.deepcopy(llava.text.config)
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    llava.text.rotary_emb = type(llava.text.rotary_emb)(config)
    frequencies = llava.text.rotary_emb.inv_freq.clone()
    with reroute.enable(llava.model, schedule=SCHEDULE):
        assert torch.equal(llava.text.rotary_emb.inv_freq, frequencies)
    assert llava.text.rotary_emb.max_seq_len_cached == config.max_position_embeddings


def test_hooks_on_parts_are_not_called(llava: TinyType) -> None:
    called: list[str] = []
    for name, module in llava.text.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    with reroute.enable(llava.model, schedule=SCHEDULE):
        assert called == []


def test_layers_alike_are_looked_at_once(llava: TinyType, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a model that is enabled again is known."""
    looked: list[int] = []
    plain = layer_facts

    def counted(adapter: Any, index: int, *given: Any) -> Any:
        looked.append(index)
        return plain(adapter, index, *given)

    monkeypatch.setattr("reroute.transformers.adapters.layers.layer_facts", counted)
    for _ in range(2):
        reroute.enable(llava.model, schedule=SCHEDULE).disable()
    assert looked == [2, 2, 4]  # one of those that run compact, and the two that rank


def test_an_unknown_type_that_fits(llava: TinyType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(llava.model.config), "model_type", "mystery")
    assert "mystery" not in ROUTED
    assert type(adapter_of(llava.model)) is ModelAdapter
    reroute.enable(llava.model, schedule=SCHEDULE).disable()
