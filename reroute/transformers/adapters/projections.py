"""How an attention makes heads of rows: by a matrix each for queries and keys, by one for all, or from latent keys."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["Projections", "projections_of"]


class Projections:
    """``q_proj`` and ``k_proj``. ``kind``: what is special, in words."""

    kind: ClassVar[str] = ""

    def __init__(self, attention: Any) -> None:
        """Of ``attention``, which may be a copy."""
        self._attention = attention

    @property
    def names(self) -> tuple[str, str]:
        """The children that get the rows first: on the way to queries, and to keys."""
        return "q_proj", "k_proj"

    @property
    def parts(self) -> tuple[str, ...]:
        """All children that are called."""
        return self.names

    def queries(self, rows: Tensor) -> Tensor:
        """(…, H * D) of ``rows`` (…, C)."""
        queries: Tensor = self._attention.q_proj(rows)
        return queries

    def keys(self, rows: Tensor) -> Tensor:
        """(…, G * D) of ``rows`` (…, C)."""
        keys: Tensor = self._attention.k_proj(rows)
        return keys

    def as_projected(self, heads: Tensor) -> Tensor:
        """Heads (…, D) that an attention function gets, with features in the order of ``queries`` and ``keys``."""
        return heads


class FusedProjections(Projections):
    """Persimmon's: one matrix makes query, key and value of each head, one behind the other."""

    kind = "one matrix for queries, keys and values"

    @property
    def names(self) -> tuple[str, str]:
        """See ``Projections``."""
        return "query_key_value", "query_key_value"

    def queries(self, rows: Tensor) -> Tensor:
        """See ``Projections``."""
        return self._part(rows, 0)

    def keys(self, rows: Tensor) -> Tensor:
        """See ``Projections``."""
        return self._part(rows, 1)

    def _part(self, rows: Tensor, part: int) -> Tensor:
        of = self._attention
        fused: Tensor = of.query_key_value(rows).unflatten(-1, (-1, 3, of.head_dim))
        return fused[..., part, :].flatten(-2)


class LatentProjections(Projections):
    """DeepSeek's: keys and values of all heads come from one latent row, and the rotated features are shared.

    Rotated features come last in the attention, often in interleaved pairs. Here they are first, in halves.
    """

    kind = "latent keys"

    @property
    def names(self) -> tuple[str, str]:
        """See ``Projections``."""
        return ("q_proj" if self._attention.q_lora_rank is None else "q_a_proj"), "kv_a_proj_with_mqa"

    @property
    def parts(self) -> tuple[str, ...]:
        """See ``Projections``."""
        of_query = () if self._attention.q_lora_rank is None else ("q_a_layernorm", "q_b_proj")
        return *self.names, *of_query, "kv_a_layernorm", "kv_b_proj"

    def queries(self, rows: Tensor) -> Tensor:
        """See ``Projections``."""
        of = self._attention
        flat = of.q_proj(rows) if of.q_lora_rank is None else of.q_b_proj(of.q_a_layernorm(of.q_a_proj(rows)))
        heads = flat.unflatten(-1, (-1, of.qk_head_dim))
        return self._rotated_first(heads, are_pairs=of.config.rope_interleave).flatten(-2)

    def keys(self, rows: Tensor) -> Tensor:
        """See ``Projections``."""
        of = self._attention
        latent, shared = of.kv_a_proj_with_mqa(rows).split([of.kv_lora_rank, of.qk_rope_head_dim], -1)
        both = of.kv_b_proj(of.kv_a_layernorm(latent)).unflatten(-1, (-1, of.qk_nope_head_dim + of.v_head_dim))
        own = both[..., : of.qk_nope_head_dim]
        heads = torch.cat([own, shared.unsqueeze(-2).expand(*own.shape[:-1], -1)], -1)
        return self._rotated_first(heads, are_pairs=of.config.rope_interleave).flatten(-2)

    def as_projected(self, heads: Tensor) -> Tensor:
        """See ``Projections``."""
        return self._rotated_first(heads, are_pairs=False)

    def _rotated_first(self, heads: Tensor, *, are_pairs: bool) -> Tensor:
        plain, turned = heads.split([self._attention.qk_nope_head_dim, self._attention.qk_rope_head_dim], -1)
        if are_pairs:
            turned = torch.cat([turned[..., 0::2], turned[..., 1::2]], -1)
        return torch.cat([turned, plain], -1)


def projections_of(attention: Any) -> Projections:
    """Those of ``attention``."""
    kinds = {"kv_a_proj_with_mqa": LatentProjections, "query_key_value": FusedProjections}
    kind = next((kind for name, kind in kinds.items() if hasattr(attention, name)), Projections)
    return kind(attention)
