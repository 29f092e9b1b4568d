"""Roles of modules when several threads give and take them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn

from reroute.transformers.interception import Intercepted, Role, intercept, role_of


@dataclass(eq=False)
class OwnRouter:
    """Attached, and whoever asks for it has ``asked`` called first."""

    asked: list[Callable[[], None]] = field(default_factory=list)
    attached: bool = True

    @property
    def is_attached(self) -> bool:
        for act in self.asked:
            act()
        return self.attached


def test_a_router_that_comes_while_another_leaves() -> None:
    """It stays: what leaves takes its own role along, and nothing of what came meanwhile."""
    module, first, second, third = nn.Linear(2, 2), OwnRouter(), OwnRouter(), OwnRouter()
    threads: list[threading.Thread] = []

    def come() -> None:
        thread = threading.Thread(target=intercept, args=(module, Intercepted, Role(third), second))
        thread.start()
        thread.join(0.2)
        threads.append(thread)

    intercept(module, Intercepted, Role(first))
    leave = intercept(module, Intercepted, Role(second), first)
    first.attached = False
    first.asked.append(come)  # in the middle of what leave does
    leave()
    for thread in threads:
        thread.join()
    assert len(threads) == 1
    assert isinstance(module, Intercepted)
    role = role_of(module)
    assert role is not None
    assert role.router is third
