"""What routing must know of a model family. An adapter for another one is a small subclass."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import is_not
from typing import Any, ClassVar

import torch

from reroute_kernels import AttentionSpec, RMSNorm, Rope

from ...errors import RerouteError, UnsupportedModelError
from ..vision import Tower
from .scoring_layer import check_parts, check_scoring_layer

__all__ = ["ModelAdapter"]

_CHANGED = (
    "The decoder has changed since reroute.enable: it, or one of its layers, was replaced. Call "
    "reroute.enable again on the model as it is now."
)


class ModelAdapter:
    """Vision-language models with a Llama-like decoder: ``input_layernorm``, ``self_attn.{q,k}_proj``, plain RoPE.

    It is bound to one model, and is a ``reroute.core.ranking.DecoderAdapter``.
    """

    model_types: ClassVar[tuple[str, ...]]
    """``config.model_type`` of the models that this adapter covers."""
    text_model_types: ClassVar[tuple[str, ...]]
    """``config.text_config.model_type`` of the decoders whose attention this adapter knows."""
    input_norms: ClassVar[tuple[str, ...]] = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen2_5_VLRMSNorm")
    """Classes of ``input_layernorm`` that compute what ``RMSNorm`` does."""
    rope: Rope = "half"
    renumbers: ClassVar[bool] = True
    """Whether position ids are one number per token, so that kept tokens may be renumbered."""
    may_lack_position_ids: ClassVar[bool] = False
    """Whether layers get position ids in some calls (``generate``) and none in others (a plain forward)."""
    may_stop_early: ClassVar[bool] = True
    """Whether the decoder runs no more layers than ``num_hidden_layers`` says, however many it has."""

    def __init__(self, model: Any) -> None:
        """Bind to ``model``.

        Raises:
            UnsupportedModelError: the decoder inside is not one that this adapter knows, its heads are spread over
                several GPUs, or ``model`` is a wrapper such as PEFT's.
        """
        if hasattr(model, "get_base_model"):  # PEFT: all attributes, 'model' too, are those of what it wraps
            raise UnsupportedModelError(
                f"{type(model).__name__} is a wrapper around the model. Pass model.get_base_model(), which has the "
                "adapters in it, or what model.merge_and_unload() returns."
            )
        if (model.tp_size or 1) > 1:
            raise UnsupportedModelError(
                f"{type(model).__name__} is loaded with tensor parallelism: each GPU has a part of the heads and would "
                "keep other tokens than the next one. Load it without tp_plan; device_map may spread its layers."
            )
        self.config: Any = model.config
        self.text_config: Any = self.config.get_text_config()
        if self.text_config.model_type not in self.text_model_types:
            raise UnsupportedModelError(
                f"{type(model).__name__} with a '{self.text_config.model_type}' decoder is not supported; "
                f"known decoders: {', '.join(self.text_model_types)}."
            )
        self.base = self._child(model, "model")
        self.text = self._child(self.base, "language_model")
        self._child(self.text, "layers")
        self.layers: Sequence[Any] = self._layers_now()
        self.model_parameters, self.base_parameters = _parameters(model), _parameters(self.base)
        self._check_structure()

    def check_base(self, model: Any) -> None:
        """Check at a call that ``model``, the whole model, still calls the base model that is routed.

        Raises:
            RerouteError: it was replaced.
        """
        if not _holds(model.model, self.base):
            raise RerouteError(_CHANGED)

    def check_layers(self, scoring: Sequence[int]) -> None:
        """Check at a call that the decoder is still what it was, and that the ``scoring`` layers can be asked to score.

        Raises:
            RerouteError: layers were replaced or are left out, or projections cannot be called outside of their layer.
        """
        now = self._layers_now() if _holds(self.base.language_model, self.text) else []
        if len(now) != len(self.layers) or any(map(is_not, now, self.layers)):
            raise RerouteError(_CHANGED)
        for index in scoring:
            check_scoring_layer(self.layers[index], index)

    def _layers_now(self) -> Sequence[Any]:
        """The layers that a forward runs.

        Raises:
            UnsupportedModelError: they are not as many as the configuration says, by which caches are made.
        """
        layers, said = list(self.text.layers), self.text_config.num_hidden_layers
        if len(layers) < said or (len(layers) > said and not self.may_stop_early):
            raise UnsupportedModelError(
                f"The decoder of {type(self.base).__name__} runs {len(layers)} layers, and its configuration says "
                f"num_hidden_layers={said}. Change one of them until they agree."
            )
        return layers[:said]

    def _check_structure(self) -> None:
        if len(set(map(id, self.layers))) < len(self.layers):
            raise UnsupportedModelError(
                f"The decoder of {type(self.base).__name__} lists the same layer several times. Give it a copy "
                "(copy.deepcopy) with a self_attn.layer_idx of its own in each place, or do not route it."
            )
        for index, layer in enumerate(self.layers):
            check_parts(layer, index)
            place = getattr(layer.self_attn, "layer_idx", index)
            if place != index:
                raise UnsupportedModelError(
                    f"Decoder layer {index} uses place {place} of the cache, and routing would look for it in place "
                    f"{index}. Set self_attn.layer_idx of layers that were moved or copied to where they are now."
                )

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Ids of the placeholders that stand for visual tokens in ``input_ids``."""
        names = ("image_token_id", "video_token_id")
        return tuple(i for name in names if (i := getattr(self.config, name, None)) is not None)

    def is_full_attention(self, layer: int) -> bool:
        """Whether ``layer`` attends to everything before a token, without a sliding window."""
        types = getattr(self.text_config, "layer_types", None)
        if types is not None:
            return bool(types[layer] == "full_attention")
        return getattr(self.text_config, "sliding_window", None) is None

    def input_norm(self, layer: int) -> RMSNorm | None:
        """See ``DecoderAdapter``. Also None if the module has hooks or an own forward, which a kernel would bypass."""
        norm = self.layers[layer].input_layernorm
        if _is_changed(norm) or type(norm).__name__ not in self.input_norms:
            return None
        return RMSNorm(norm.weight, norm.variance_epsilon)

    def normalise(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """See ``DecoderAdapter``."""
        normed: torch.Tensor = self.layers[layer].input_layernorm(rows)
        return normed

    def final_norm(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``DecoderAdapter``."""
        normed: torch.Tensor = self.text.norm(rows)
        return normed

    def project(self, layer: int, normed: torch.Tensor, query_rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecoderAdapter``."""
        attention = self.layers[layer].self_attn
        heads = (-1, attention.head_dim)
        query = attention.q_proj(normed.index_select(0, query_rows.to(normed.device))).unflatten(-1, heads)
        keys = attention.k_proj(normed).unflatten(-1, heads)
        return attention.q_norm(query) if hasattr(attention, "q_norm") else query, keys

    def key_weights(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``DecoderAdapter``."""
        attention = self.layers[layer].self_attn
        projection, heads = attention.k_proj, (-1, attention.head_dim)
        has_norm = self.attention_spec(layer).key_norm is not None
        if type(projection) is not torch.nn.Linear or _is_changed(projection) or has_norm:
            raise RerouteError(
                f"Layer {layer} makes keys by more than one matrix ({type(projection).__name__}, hooks or a key norm), "
                "and FoldedAttention needs that matrix. Merge adapters into weights, or rank by LastTokenAttention."
            )
        bias = projection.bias
        return projection.weight.unflatten(0, heads), None if bias is None else bias.unflatten(0, heads)

    def attention_spec(self, layer: int) -> AttentionSpec:
        """See ``DecoderAdapter``."""
        attention = self.layers[layer].self_attn
        norm = getattr(attention, "k_norm", None)
        key_norm = None if norm is None else RMSNorm(norm.weight, norm.variance_epsilon)
        return AttentionSpec(float(attention.scaling), self.rope, key_norm)

    def rope_tables(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecoderAdapter``."""
        cos, sin = self.text.rotary_emb(hidden, position_ids=ids)
        return cos, sin

    @cached_property
    def tower(self) -> Tower:
        """The vision tower, for rankers that look at it.

        Raises:
            UnsupportedModelError: it is not one that is known.
        """
        raise NotImplementedError

    def image_grids(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
        """Per sample, per image: (rows, columns) of its visual tokens, in prompt order."""
        raise NotImplementedError

    def visual_runs(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
        """Per sample: (placeholder id, length) of each run of visual tokens in ``inputs["input_ids"]`` (B, L)."""
        runs = []
        for row in inputs["input_ids"].cpu():
            ids, lengths = torch.unique_consecutive(row, return_counts=True)
            pairs = zip(ids.tolist(), lengths.tolist(), strict=True)
            runs.append([(token, length) for token, length in pairs if token in self.visual_ids])
        return runs

    @staticmethod
    def _child(module: Any, name: str) -> Any:
        child = getattr(module, name, None)
        if child is None:
            raise UnsupportedModelError(
                f"{type(module).__name__} has no '{name}'. Pass the whole model (…ForConditionalGeneration), "
                "not one of its parts."
            )
        return child


def _parameters(module: Any) -> tuple[str, ...]:
    """Names of what a module can be called with, in order."""
    module = getattr(module, "_orig_mod", module)  # what torch.compile returns takes anything
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def _holds(module: Any, part: Any) -> bool:
    """Whether ``module`` is ``part``, or was put around it."""
    return module is part or any(inner is part for inner in module.modules())


def _is_changed(module: Any) -> bool:
    """Whether calling ``module`` does more than its class says."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)
