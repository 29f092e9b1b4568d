"""Which patch each visual token shows, in models that make one of every patch: row after row, in prompt order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RerouteError

__all__ = ["Grid", "grids_of_patches"]

Grid = tuple[int, int]
"""Rows and columns."""


def grids_of_patches(
    runs: Sequence[Sequence[tuple[int, int]]], vision_config: Any, inputs: Mapping[str, Any]
) -> list[list[Grid]]:
    """Per sample, per image: its grid, from ``ModelAdapter.visual_runs`` and the sizes that the vision tower goes by.

    Images that follow one another without text between them form one run of placeholders. Pixtral ends each row of
    patches with a token of its own, which is text: there each row is a run.

    Raises:
        RerouteError: the placeholders are not those of the patches of the images.
    """
    lengths, known = [[length for _, length in sample] for sample in runs], _grids(vision_config, inputs)
    samples = _assigned(lengths, known)
    if samples is None:
        raise RerouteError(
            "Which patch of a picture each visual token shows is not known for this prompt: its placeholders come "
            f"in runs of {lengths}, its pictures have {known} rows and columns of patches. Routing itself needs no "
            "grid: use reroute.enable and handle.trace."
        )
    return samples


def _grids(vision_config: Any, inputs: Mapping[str, Any]) -> list[Grid]:
    """Rows and columns of patches of each image."""
    pixels, sizes = inputs.get("pixel_values"), inputs.get("image_sizes")
    patch = getattr(vision_config, "patch_size", None)
    if pixels is None or patch is None:
        return []
    if sizes is None:
        sizes = [image.shape[-2:] for image in pixels]
    height, width = (patch, patch) if isinstance(patch, int) else patch
    return [(int(rows) // height, int(columns) // width) for rows, columns in sizes]


def _assigned(runs: list[list[int]], grids: list[Grid]) -> list[list[Grid]] | None:
    """The grids of each sample, whose placeholders come in these ``runs``; None if they are not those of the grids."""
    left, samples = list(grids), []
    for lengths in runs:
        sample = []
        while lengths:
            rest = _after(lengths, left[0]) if left else None
            if rest is None:
                return None
            lengths = rest
            sample.append(left.pop(0))
        samples.append(sample)
    return None if left else samples


def _after(runs: list[int], grid: Grid) -> list[int] | None:
    """``runs`` of placeholders without those of one image, which come first; None if they do not."""
    rows, columns = grid
    if runs[0] >= rows * columns:
        rest = runs[0] - rows * columns
        return [rest, *runs[1:]] if rest else runs[1:]
    return runs[rows:] if runs[:rows] == [columns] * rows else None
