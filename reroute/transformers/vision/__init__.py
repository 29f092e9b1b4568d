"""Vision towers that rankers may look at: one file for each kind."""

from __future__ import annotations

from .base import Tower, TowerRun
from .clip import ClipTower
from .qwen2_5_vl import Qwen25VLTower
from .recording import Recording, attach, recording_of

__all__ = ["ClipTower", "Qwen25VLTower", "Recording", "Tower", "TowerRun", "attach", "recording_of"]
