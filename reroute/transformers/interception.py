"""Modules whose calls pass through routing: their class becomes a subclass of itself until they are released.

A subclass rather than hooks, as FSDP2 does it. It sees every way in which a call can end, KeyboardInterrupt included;
it lies around whatever others put on the module, earlier or later (hooks, accelerate's ``forward``, gradient
checkpointing, compiled code); methods keep their names, signatures and ``__self__``; and nothing else of it changes.
"""

from __future__ import annotations

import copyreg
import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import nn

from ..errors import RerouteError

__all__ = ["Intercepted", "Role", "intercept", "own_method", "role_of"]

_lock = threading.Lock()
"""Held while a module gets a role or loses it: one router may leave in one thread while the next comes in another."""


class Role(NamedTuple):
    """What an intercepted module is: a part of the model of ``router``; ``layer`` numbers decoder layers."""

    router: Any
    layer: int = 0


class Intercepted:
    """Base of the classes that are put before a module's own: their methods call ``super()``.

    A method whose signature others read is named in ``signed``: it takes that of the module's own.
    """

    signed: ClassVar[tuple[str, ...]] = ()
    # Any name of nn.Module's own namespace would do; found on the class once the module is released.
    _reroute: Role | None = None
    _plain_class: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are those of the plain module."""
        state = self.__dict__.copy()
        state.pop("_reroute", None)
        # Not by __newobj__: pickle insists that it makes an object of the class of this one.
        return copyreg._reconstructor, (self._plain_class, object, None), state  # type: ignore[attr-defined]

    def __copy__(self) -> Any:
        """A shallow copy shares its children, which are intercepted, and so is."""
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(self.__dict__)
        return copied


def role_of(module: nn.Module) -> Role | None:
    """What ``module`` is while it is intercepted, else None."""
    role: Role | None = getattr(module, "_reroute", None)
    # Shallow copies keep the role of what was released since.
    return role if role is not None and role.router.is_attached else None


def own_method(kind: type[Intercepted], module: Any, name: str) -> Callable[..., Any]:
    """The method of ``module``'s own class before which ``kind`` lies, also once that is released.

    Bound methods may be kept for longer: ``model.generate`` by a pipeline, ``forward`` by what accelerate or Dynamo put
    around it.
    """
    if isinstance(module, kind):
        method: Callable[..., Any] = getattr(super(kind, module), name)
        return method
    return functools.partial(getattr(type(module), name), module)


def intercept(module: nn.Module, kind: type[Intercepted], role: Role, replaced: Any = None) -> Callable[[], None]:
    """Put ``kind`` before the class of ``module``, or give it this role instead of that of the router ``replaced``.

    What is returned undoes it: to what it was before, if that is still attached.

    Raises:
        RerouteError: it is intercepted by another router, so it is a part of two models.
    """
    with _lock:
        former = role_of(module)
        if former is not None and former.router is not replaced:
            raise RerouteError(
                f"{type(module).__name__} is a part of another model that is routed. Disable routing of that one "
                "first, or give each model modules of its own."
            )
        if not isinstance(module, kind):  # or others derived their class from ours, and it stayed
            module.__class__ = _subclass(type(module), kind)  # type: ignore[arg-type]  # types are hashable
        module.__dict__["_reroute"] = role
    return functools.partial(_release, weakref.ref(module), role, former)


def _release(reference: weakref.ref[nn.Module], role: Role, former: Role | None) -> None:
    module = reference()
    with _lock:
        if module is None or vars(module).get("_reroute") is not role:
            return  # it has another role since
        if former is not None and former.router.is_attached:
            module.__dict__["_reroute"] = former
            return
        module.__dict__.pop("_reroute", None)
        # A class that others have put before ours since (FSDP2) stays; without a role ours does nothing.
        plain = vars(type(module)).get("_plain_class")
        if plain is not None:
            module.__class__ = plain


@functools.cache
def _subclass(plain: type[Any], kind: type[Any]) -> type:
    """One class for all modules of a class: compiled code is compiled once for them."""
    # Its name is the plain one's: configurations, wrapping policies and recorders of outputs go by it.
    names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
    namespace: dict[str, Any] = {**names, "_plain_class": plain}
    for name in kind.signed:
        namespace[name] = functools.wraps(getattr(plain, name))(_copied(getattr(kind, name)))
    make: Any = type(plain)
    subclass: type = make(plain.__name__, (kind, plain), namespace)
    if "forward" in vars(subclass) and "forward" not in namespace:
        # Transformers wraps the forward of every subclass of its layers, to checkpoint the outermost one: a backward
        # that comes after the release must find the one that the forward found.
        del subclass.forward  # type: ignore[attr-defined]
    return subclass


def _copied(function: types.FunctionType) -> types.FunctionType:
    code, variables, name = function.__code__, function.__globals__, function.__name__
    return types.FunctionType(code, variables, name, function.__defaults__, function.__closure__)
