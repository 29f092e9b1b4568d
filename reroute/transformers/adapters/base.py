"""What routing must know of a model, found out by looking at it. What cannot be found out is a small subclass."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from functools import cached_property
from operator import is_not
from typing import Any, ClassVar

import torch

from reroute_kernels import AttentionSpec, Backend, RMSNorm, RopeTables

from ...core.cost import ModelShape
from ...errors import RerouteError, UnsupportedModelError
from ..parallel import (
    check_heads,
    check_unit,
    check_unwrapped,
    has_distributed_weights,
    head_ranks,
    is_sharded,
    unshard,
)
from ..vision import Tower
from . import places
from .facts import LayerFacts, rms_norm_of, without_gate
from .kinds import LayerKinds
from .late_norms import as_if_normed_first
from .layer_parts import LayerParts
from .layers import Layers
from .projections import projections_of
from .recurrent import check_row_by_row
from .scoring_layer import check_part, check_scoring_layer
from .tables import no_rotation, tables_in

__all__ = ["ModelAdapter"]

_CHANGED = (
    "The decoder has changed since reroute.enable: it, or one of its layers, was replaced. Call "
    "reroute.enable again on the model as it is now."
)


class ModelAdapter(LayerKinds):
    """A vision-language model of which all is known, bound to it. It is a ``reroute.rankers.base.DecoderAdapter``.

    Subclasses override what the facts of a layer do not hold; what they say is proved as all else is.

    - ``first_layer``: the first layer that may decide: before it the decoder adds features of the pictures.
    - ``has_several_tables``: whether some layers get other rotary tables than others.
    - ``reads_kinds``: whether layers are told something of each token beside its hidden state (``PER_TOKEN``).
    - ``is_causal``: whether without a mask a token sees only what comes before it, in the layers that run compact.
    - ``position_axes``: how many position ids a token has.
    - ``renumbers``: whether position ids are one number per token, from which rotary tables are made, so that kept
      tokens may be renumbered. Of M-RoPE's, layers get position ids in some calls (``generate``) and none in others.
    - ``decoder_embeds``: whether the decoder itself makes hidden states of ids and pictures.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    """``config.model_type`` of the models that a subclass is for."""
    attention: ClassVar[str] = "self_attn"
    """What a layer calls its attention."""
    marks: ClassVar[str | None] = None
    """The argument (B, L) of the base model that marks visual tokens, where no ids do."""
    merges: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the decoder that it makes hidden states of, before its first layer, beside ids."""

    def __init__(self, model: Any) -> None:
        """Bind to ``model``.

        Raises:
            UnsupportedModelError: not all that must be known of its decoder can be found out, it is spread over
                processes by rows or layers, or ``model`` is a wrapper such as PEFT's or has FSDP1's.
        """
        if hasattr(model, "get_base_model"):  # PEFT: all attributes, 'model' too, are those of what it wraps
            raise UnsupportedModelError(
                f"{type(model).__name__} is a wrapper around the model. Pass model.get_base_model(), which has the "
                "adapters in it, or what model.merge_and_unload() returns."
            )
        check_unwrapped(model)
        self.ranks = head_ranks(model)
        self.config: Any = model.config
        self.text_config: Any = self.config.get_text_config()
        self.base = places.base_of(model)
        self._decoder = places.decoder_path(self.base)
        self.text = self._decoder_now()
        places.child(self.text, "layers")
        self.layers: Sequence[Any] = self._layers_now()
        self.read_kinds()
        self.position_axes = places.position_axes(self.base, self.text)
        self.renumbers = self.position_axes == 1 and hasattr(self.text, "rotary_emb")
        self.decoder_embeds = bool(self.merges) or self.base is self.text
        self.first_layer = places.feature_levels(self.config, self.text, self.merges)
        self.model_parameters, self.base_parameters = places.parameters(model), places.parameters(self.base)
        self.text_parameters = places.parameters(self.text)
        self.reads_kinds = not set(places.PER_TOKEN).isdisjoint(self.text_parameters)
        self._check_structure()
        self._known = Layers.of(self.text)
        self._facts: dict[int, LayerFacts] = {}
        self.parts: dict[int, LayerParts] = {}  # as they were last seen
        self.is_causal, self.has_several_tables = True, False

    # --- the model as it is at a call -----------------------------------------------------------------------------

    def check_base(self, model: Any) -> None:
        """Check at a call that ``model``, the whole model, still calls the base model that is routed.

        Raises:
            RerouteError: it was replaced.
        """
        if not places.holds(places.base_of(model), self.base):
            raise RerouteError(_CHANGED)

    def check_layers(self, scoring: Sequence[int]) -> None:
        """Check at a call that the decoder is still what it was, and that the ``scoring`` layers can be asked to score.

        What was changed inside of these layers since it was proved is found out and proved anew.

        Raises:
            RerouteError: layers were replaced or are left out, or projections cannot be called outside of their layer.
        """
        now = self._layers_now() if places.holds(self._decoder_now(), self.text) else []
        if len(now) != len(self.layers) or any(map(is_not, now, self.layers)):
            raise RerouteError(_CHANGED)
        for index in scoring:
            self._facts[index] = self._known.proved(self, index)
            if not self.parts[index].are_bare:
                check_scoring_layer(self.layers[index], index, self._scoring_parts(index))

    def check_facts(self, scoring: Sequence[int], compact: Sequence[int], first: int) -> None:
        """Find out what must be known of the ``scoring`` layers and of those that run ``compact``, and prove it.

        ``first``: the first layer whose input is looked at.

        Raises:
            UnsupportedModelError: something cannot be found out, or is not what the layer does.
        """
        for index in compact:
            if self.is_recurrent(index):
                self._known.check_recurrent(self, index)
            elif self.is_row_by_row(index):
                check_row_by_row(self.layers[index], index, getattr(self.layers[index], self.mixer(index)))
        attending = filter(self.attends, compact)
        kinds = {self._known.facts(self, index, like_others=True).is_causal for index in attending}
        if len(kinds) > 1:
            raise UnsupportedModelError(
                f"Without a mask some layers of {type(self.text).__name__} see later tokens and others do not, and "
                "routing takes a missing mask for the same in all. Disable routing for this model."
            )
        self.is_causal = kinds.pop() if kinds else True
        self.has_several_tables = self._known.check_calls(self, compact, first)
        for index in scoring:
            self._facts[index] = facts = self._known.proved(self, index)
            if self.ranks is not None:
                self.ranks.check(index, *facts.heads)

    def _decoder_now(self) -> Any:
        return functools.reduce(getattr, self._decoder, self.base)

    def _layers_now(self) -> Sequence[Any]:
        """The layers that a forward runs.

        Raises:
            UnsupportedModelError: they are not as many as the configuration says, by which caches are made.
        """
        layers, said = list(self.text.layers), self.text_config.num_hidden_layers
        if len(layers) < said or (len(layers) > said and not places.stops_early(self.text)):
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
            mixer = self.mixer(index)
            place = getattr(check_part(layer, mixer, index), "layer_idx", index)
            if place != index:
                raise UnsupportedModelError(
                    f"Decoder layer {index} uses place {place} of the cache, and routing would look for it in place "
                    f"{index}. Set {mixer}.layer_idx of layers that were moved or copied to where they are now."
                )

    def bound_to(self, layers: Mapping[int, Any], facts: Mapping[int, LayerFacts]) -> ModelAdapter:
        """One that says of these layers, by index, what this one says of the model's."""
        bound = copy.copy(self)
        bound.layers, bound._facts = layers, dict(facts)  # type: ignore[assignment]  # layers are only indexed here
        bound.ranks = None  # they are whole
        return bound

    # --- a layer --------------------------------------------------------------------------------------------------

    def facts(self, layer: int) -> LayerFacts:
        """What ``layer`` does. UnsupportedModelError if it cannot be found out."""
        if layer not in self._facts:
            self._facts[layer] = self._known.facts(self, layer)
        return self._facts[layer]

    @property
    def visual_ids(self) -> tuple[int, ...]:
        """Ids of the placeholders that stand for visual tokens in ``input_ids``."""
        return places.visual_ids(self.config)

    def input_norm(self, layer: int) -> RMSNorm | None:
        """See ``DecoderAdapter``. Also None if the module has hooks or an own forward, which a kernel would bypass."""
        facts = self.facts(layer)
        norm = self._input_norm(layer)
        return None if not facts.has_rms_input_norm or _is_changed(norm) else rms_norm_of(norm)

    def normalise(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """See ``DecoderAdapter``."""
        norm = self._input_norm(layer)
        normed: torch.Tensor = rows if norm is None else norm(rows)
        return normed

    def final_norm(self, rows: torch.Tensor) -> torch.Tensor:
        """See ``DecoderAdapter``."""
        normed: torch.Tensor = places.final_norm(self.text)(rows)
        return normed

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 keeps weights of the decoder apart while it does not run."""
        return is_sharded(self.text) or (self.ranks is None and has_distributed_weights(self.text))

    def unshard(self, layer: int) -> None:
        """Have the weights of ``layer`` whole, which is about to run."""
        unshard(self.layers[layer])

    def agreeing(self, backend: Backend) -> Backend:
        """See ``DecoderAdapter``."""
        return backend if self.ranks is None else self.ranks.agreeing(backend)

    def check_final_norm(self) -> None:
        """See ``DecoderAdapter``."""
        check_unit("the last norm of the decoder", places.final_norm(self.text))

    def project(self, layer: int, normed: torch.Tensor, tables: RopeTables) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecoderAdapter``."""
        own = self.project_own(layer, normed, tables)
        if self.ranks is None:
            return own
        query, keys = map(self.ranks.gather, own, self.facts(layer).heads)
        return query, keys

    def project_own(self, layer: int, normed: torch.Tensor, tables: RopeTables) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecoderAdapter``. Keys come with their norm if that is not one of ``attention_spec``."""
        query, keys = self._projected(layer, normed, tables)
        check_heads(self.ranks, layer, (query.shape[1], keys.shape[1]), self.facts(layer).heads)
        return query, keys

    def _projected(self, layer: int, normed: torch.Tensor, tables: RopeTables) -> tuple[torch.Tensor, torch.Tensor]:
        attention, facts = self._attention(layer), self.facts(layer)
        heads, projections = (-1, facts.head_dim), projections_of(attention)
        query = projections.queries(normed.index_select(0, tables.query_rows.to(normed.device)))
        query = without_gate(query, facts.head_dim) if facts.has_query_gate else query.unflatten(-1, heads)
        keys = projections.keys(normed).unflatten(-1, heads)
        if facts.norms_come_last:
            return self._as_if_normed_first(layer, query, tables), keys
        if facts.query_norm is not None:
            query = getattr(attention, facts.query_norm)(query)
        query = query if facts.query_factor == 1 else query * facts.query_factor
        if facts.key_norm is not None and self._key_norm(layer) is None:
            keys = getattr(attention, facts.key_norm)(keys)
        return query, keys

    def _as_if_normed_first(self, layer: int, query: torch.Tensor, tables: RopeTables) -> torch.Tensor:
        attention, facts = self._attention(layer), self.facts(layer)
        norms = [getattr(attention, str(name)) for name in (facts.query_norm, facts.key_norm)]
        if any(map(_is_changed, norms)):
            raise RerouteError(
                f"Norms of query or key heads of layer {layer} have hooks or another forward, and come behind the "
                "rotation, where routing runs their formula alone. Take off what is on them, or disable routing."
            )
        of_query, of_key = map(rms_norm_of, norms)
        return as_if_normed_first(query, of_query, of_key, tables, facts.rope)

    def key_weights(self, layer: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``DecoderAdapter``."""
        projection: Any = getattr(self._attention(layer), "k_proj", None)
        facts = self.facts(layer)
        is_plain = type(projection) is torch.nn.Linear and type(projection.weight) in (torch.Tensor, torch.nn.Parameter)
        if not is_plain or _is_changed(projection) or facts.key_norm is not None:
            raise RerouteError(
                f"Layer {layer} makes keys by more than one matrix ({type(projection).__name__}, hooks, a key norm, or "
                "quantised or distributed weights), and FoldedAttention needs that matrix. Merge adapters into "
                "weights, or rank by LastTokenAttention."
            )
        bias, heads = projection.bias, (-1, facts.head_dim)
        return projection.weight.unflatten(0, heads), None if bias is None else bias.unflatten(0, heads)

    def attention_spec(self, layer: int) -> AttentionSpec:
        """See ``DecoderAdapter``."""
        return AttentionSpec(self.facts(layer).scaling, self.facts(layer).rope, self._key_norm(layer))

    def rotates(self, layer: int) -> bool:
        """See ``DecoderAdapter``."""
        return self.facts(layer).rotates

    def rope_tables(self, hidden: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """See ``DecoderAdapter``. Those of a decoder without any turn nothing."""
        if not hasattr(self.text, "rotary_emb"):
            return no_rotation(hidden, self.head_dim)
        tables = tables_in(self.text.rotary_emb(hidden, position_ids=ids, **self._kind_of_tables))
        assert tables is not None  # those of layers were looked at
        return tables

    def counts_from(self, layer: int) -> int | None:
        """The position from which on it matters that the code of ``layer`` counts the rows that are present.

        None if that is not known: then it may not count any.
        """
        return None

    @cached_property
    def head_dim(self) -> int:
        """Features of a head, by the configuration: the width of tables where layers get none."""
        return ModelShape.from_config(self.text_config).head_dim

    @cached_property
    def _kind_of_tables(self) -> dict[str, str]:
        """How a rotary module that makes several tables is asked for those of full layers."""
        has_kinds = "layer_type" in places.parameters(self.text.rotary_emb)
        return {"layer_type": "full_attention"} if has_kinds else {}

    def _attention(self, layer: int) -> Any:
        return getattr(self.layers[layer], self.attention)

    def _input_norm(self, layer: int) -> Any:
        name = self.facts(layer).input_norm
        return None if name is None else getattr(self.layers[layer], name)

    def _key_norm(self, layer: int) -> RMSNorm | None:
        """Of the keys, if kernels can run it."""
        facts = self.facts(layer)
        if facts.key_norm is None or not facts.has_rms_key_norm:
            return None
        norm = getattr(self._attention(layer), facts.key_norm)
        if _is_changed(norm):
            return None
        formula = rms_norm_of(norm)
        return formula._replace(weight=torch.ones_like(formula.weight)) if facts.norms_come_last else formula

    def _scoring_parts(self, layer: int) -> tuple[str, ...]:
        """Modules that scoring calls in ``layer``."""
        norm = self.facts(layer).input_norm
        parts = projections_of(self._attention(layer)).parts
        projections = tuple(f"{self.attention}.{part}" for part in parts)
        return projections if norm is None else (norm, *projections)

    # --- pictures -------------------------------------------------------------------------------------------------

    @cached_property
    def tower(self) -> Tower:
        """The vision tower, for rankers that look at it.

        Raises:
            UnsupportedModelError: it is not one that is known.
        """
        raise UnsupportedModelError(
            f"A ranker of this schedule looks at the pictures, and what {type(self.base).__name__} has is not a vision "
            "tower that is known. Choose rankers that do not look at them."
        )

    def image_grids(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
        """Per sample, per image: (rows, columns) of its visual tokens, in prompt order.

        Raises:
            RerouteError: they are not known.
        """
        raise RerouteError(
            f"Which patch of a picture each visual token shows is not known for {type(self.base).__name__}. Routing "
            "itself needs no grid: use reroute.enable and handle.trace."
        )

    def visual_runs(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int]]]:
        """Per sample: (placeholder id, length) of each run of visual tokens in ``inputs["input_ids"]`` (B, L)."""
        runs = []
        for row in inputs["input_ids"].cpu():
            ids, lengths = torch.unique_consecutive(row, return_counts=True)
            pairs = zip(ids.tolist(), lengths.tolist(), strict=True)
            runs.append([(token, length) for token, length in pairs if token in self.visual_ids])
        return runs


def _is_changed(module: Any) -> bool:
    """Whether calling ``module`` does more than its class says."""
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)
