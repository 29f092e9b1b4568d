"""Prefills as graphs of a shape class: which prompts a graph may serve, at what waste, what it is told of each, and
where its memory is.
"""

from .alignment import Alignment, in_one, picked
from .arena import Arena
from .class_plan import ClassPlan, class_tensors
from .recorder import RECORDERS, Recorder, check_device
from .settings import Graphs, GraphUse
from .shape_class import TILE, ShapeClass, in_tiles, needed_rows
from .static_home import StaticHome
from .store import GraphStore
from .table import PromptTable
from .waste import Roofline, Waste, waste

__all__ = [
    "RECORDERS",
    "TILE",
    "Alignment",
    "Arena",
    "ClassPlan",
    "GraphStore",
    "GraphUse",
    "Graphs",
    "PromptTable",
    "Recorder",
    "Roofline",
    "ShapeClass",
    "StaticHome",
    "Waste",
    "check_device",
    "class_tensors",
    "in_one",
    "in_tiles",
    "needed_rows",
    "picked",
    "waste",
]
