"""Muon, an optimiser for weight matrices (Jordan et al., 2024), with equal shapes batched."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final, overload

import torch
from torch import Tensor

# Quintic Newton-Schulz coefficients that push singular values towards 1 in five rounds.
COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
ROUNDS: Final = 5


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made (nearly) orthogonal, for two-dimensional parameters."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        """`lr` is on the scale of AdamW's: updates are as large as AdamW's would be."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Takes no closure."""
        if closure is not None:
            raise ValueError("Muon takes no closure: compute the gradients before calling step()")
        for group in self.param_groups:
            self._step_group(group)
        return None

    def _step_group(self, group: dict[str, Any]) -> None:
        # One batched orthogonalisation per shape: many small ones would be slow on a CPU.
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            update = parameter.grad.lerp(state["momentum"], group["momentum"])
            rows, columns = parameter.shape
            by_shape[rows, columns].append((parameter, update))
        for (rows, columns), pairs in by_shape.items():
            updates = orthogonalise(torch.stack([update for _, update in pairs]))
            scale = 0.2 * max(rows, columns) ** 0.5  # the size of an AdamW update
            for (parameter, _), update in zip(pairs, updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices (n, rows, columns) with the singular vectors of the given ones."""
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x
