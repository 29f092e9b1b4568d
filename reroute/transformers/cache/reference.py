"""Cache layers that keep all of the first prompt, and a window of what comes after it."""

from __future__ import annotations

import torch

from .layers import RoutedLayer, stored_as
from .storage import keeps_prompt, prompt_rows, visible_columns

__all__ = ["RoutedReferenceLayer"]


@stored_as(keeps_prompt)
class RoutedReferenceLayer(RoutedLayer):  # type: ignore[no-untyped-call]
    """A routed layer that keeps its rows of the prompt, and the last W - 1 that came later.

    Transformers' masks have a column for each token of the prompt, and for what a layer keeps of later ones. What
    ``key_positions_with`` says are such columns. The prompt's length in the attributes of the plain class, from which
    Transformers makes these masks, is the logical one.
    """

    prefill_length: int
    prefill_cumulative_length: int

    def begin(self) -> None:
        """See ``RoutedLayer``."""
        self.prefill_length = self.prefill_cumulative_length = self.get_seq_length()

    def key_positions_with(self, new: int) -> torch.Tensor:
        """See ``RoutedLayer``: columns of the mask."""
        prompt = self.all_positions_until(self.prefill_length)
        later = torch.arange(self.prefill_length, self.columns_with(new), device=prompt.device)
        return torch.cat([prompt, later.expand(len(prompt), -1)], 1)

    def columns_with(self, new: int) -> int:
        """See ``RoutedLayer``."""
        return self.prefill_length + visible_columns(self, 0) - prompt_rows(self) + new
