"""What may be drawn: calls and what happens inside of them, in such shares that they meet."""

from __future__ import annotations

from typing import Any

from calls import ALL_PLACES
from hypothesis import strategies as st
from verdicts import Act, Call
from world_settings import SETTINGS

__all__ = ["any_call", "block_kinds", "changes", "lanes", "later", "moves", "new", "prompts", "routings", "subjects"]

lanes = st.integers(0, 1)
subjects = st.sampled_from([0, 0, 0, 0, 1])
_often = [*["pyramid"] * 3, *["growing"] * 3, *["reopening"] * 9]
routings = st.sampled_from([*SETTINGS, *_often, "removal", "renumbered", "everything"])

changes = st.sampled_from(
    [
        *["enable"] * 3,
        "enable in a block",
        "enable everywhere",
        "disable",
        "disable by its handle",
        "disable everywhere",
        "copy or drop a model",
    ]
)
block_kinds = st.sampled_from(["settings", "a plan", "a plan", "no plan", *["close"] * 3])
moves = st.sampled_from(["reorder", "select", "repeat", "copy", "drop", *["crop"] * 3])

prompts = st.just("new")
new = st.sampled_from(["new", "new", "generation"])
later = st.sampled_from(["following", "following", "later generation"])
_kinds = st.sampled_from(["new", "new", "following", "generation", "later generation"])
_ways = st.sampled_from([*["model"] * 3, *["forward"] * 2, *["base"] * 2, "decoder"])
# Most are of one shape: what belongs to one call would fit another one.
_names = st.lists(
    st.sampled_from(["question", "like it", "question", "like it", "late", "two pictures", "words"]),
    min_size=1,
    max_size=2,
).map(tuple)
_more = st.sampled_from([("one",), ("three",), ("picture",), ("talk",), ("picture", "talk"), ("talk", "picture")])
_places = st.sampled_from(list(ALL_PLACES))
_happenings = st.sampled_from([*["pause"] * 4, *["call"] * 3, *["twin"] * 2, *["interrupt"] * 2, "enable", "disable"])
_rarely = st.sampled_from([True, *[False] * 7])
_DEPTH = 2
"""How deep calls may lie in calls."""


@st.composite
def any_act(draw: st.DrawFn, is_generation: bool, depth: int) -> Act:
    what: Any = draw(_happenings)
    if what == "call":
        what = draw(any_call(depth=depth + 1))
    nth = draw(st.sampled_from([0, 0, 1])) if is_generation else 0
    return Act(draw(_places), what, nth, draw(st.booleans()))


@st.composite
def any_call(draw: st.DrawFn, kinds: st.SearchStrategy[str] = _kinds, depth: int = 0, pauses: bool = False) -> Call:
    """Of one of these ``kinds``. ``depth``: how many calls it is inside of. ``pauses``: it does, and nothing else."""
    kind = draw(kinds)
    is_generation, is_later = "generation" in kind, kind in ("following", "later generation")
    acts: tuple[Act, ...] = ()
    if pauses:
        acts = (Act(draw(_places), "pause"),)
    elif depth < _DEPTH:
        acts = tuple(draw(any_act(is_generation, depth)) for _ in range(draw(st.sampled_from([0, 1, 1, 2]))))
    return Call(
        way="generate" if is_generation else draw(_ways),
        names=draw(_more) if is_later else draw(_names),
        subject=draw(subjects),
        follows=draw(st.integers(0, 3)) if is_later else None,
        side=draw(st.sampled_from(["left", "left", "right"])) if kind == "new" else "left",
        answer=not is_generation and draw(st.booleans()),
        cache="own"
        if is_later
        else draw(st.sampled_from(["own", "none"] if is_generation else ["own", "given", "none"])),
        positions=kind != "new" or draw(st.booleans()),
        spelling=draw(st.sampled_from(["all", "new"])) if kind == "later generation" else "all",
        at=draw(routings) if draw(st.integers(0, 3)) == 3 else None,
        listener=draw(_rarely),
        acts=acts,
    )
