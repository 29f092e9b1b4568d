"""Prefills as graphs of a shape class: which prompts a graph may serve, at what waste, what it is told of each."""

from .shape_class import TILE, ShapeClass
from .table import PromptTable
from .waste import Roofline, Waste, waste

__all__ = ["TILE", "PromptTable", "Roofline", "ShapeClass", "Waste", "waste"]
