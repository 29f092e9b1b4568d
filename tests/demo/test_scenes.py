from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from reroute.demo.tinyvlm import digits
from reroute.demo.tinyvlm.boxes import BIN, from_bins, to_bins
from reroute.demo.tinyvlm.digits import Split
from reroute.demo.tinyvlm.scenes import (
    GAP,
    GRID,
    PATCH,
    RGB,
    SIDE,
    Scene,
    coverage,
    draw,
)

SPLITS = tuple(digits.SPLITS)


def scenes(count: int = 40, split: Split = "validation", seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [draw(rng, split, (4, 8), paired=bool(i % 2)) for i in range(count)]


def test_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    source = datasets.load_digits()
    images, labels = digits.load()
    assert images.dtype == labels.dtype == np.uint8
    np.testing.assert_array_equal(images, source.images)
    np.testing.assert_array_equal(labels, source.target)


def test_written_file_is_the_shipped_one(tmp_path: Path) -> None:
    pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits.write(tmp_path / "digits.npz")
    with np.load(tmp_path / "digits.npz") as fresh:
        np.testing.assert_array_equal(fresh["images"], digits.load()[0])
        np.testing.assert_array_equal(fresh["labels"], digits.load()[1])


def test_splits_share_no_image_and_cover_all() -> None:
    used = [index for split in SPLITS for k in range(10) for index in digits.indices(split, k)]
    assert sorted(used) == list(range(1797))


def test_splits_hold_every_class() -> None:
    assert all(len(digits.indices(split, k)) >= 20 for split in SPLITS for k in range(10))


def test_no_image_of_a_split_is_a_copy_of_another_splits() -> None:
    images = digits.load()[0].reshape(1797, -1)
    distinct = [{row.tobytes() for row in images[r.start : r.stop]} for r in digits.SPLITS.values()]
    assert not distinct[0] & distinct[1]
    assert not distinct[0] & distinct[2]
    assert not distinct[1] & distinct[2]


def test_unknown_split_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, validation, test"):
        digits.indices("dev", 3)


@pytest.mark.parametrize("split", SPLITS)
def test_scene_follows_from_the_seed(split: Split) -> None:
    for a, b in zip(scenes(6, split, 5), scenes(6, split, 5), strict=True):
        assert a.digits == b.digits
        assert a.texture == b.texture
        np.testing.assert_array_equal(a.pixels, b.pixels)
    assert scenes(1, split, 6)[0].digits != scenes(1, split, 5)[0].digits


def test_scene_is_well_formed() -> None:
    for scene in scenes() + scenes(split="train"):
        assert scene.pixels.shape == (SIDE, SIDE, 3)
        assert scene.pixels.dtype == np.float32
        assert scene.pixels.min() >= 0
        assert scene.pixels.max() <= 1
        assert scene.image().size == (SIDE, SIDE)
        boxes = [digit.box for digit in scene.digits]
        for i, (x0, y0, x1, y1) in enumerate(boxes):
            assert 0 <= x0 < x1 <= SIDE
            assert 0 <= y0 < y1 <= SIDE
            for u0, v0, u1, v1 in boxes[:i]:
                assert x0 - u1 >= GAP or u0 - x1 >= GAP or y0 - v1 >= GAP or v0 - y1 >= GAP


def test_boxes_hold_the_ink() -> None:
    # The pixels most like the digit's colour, in its box, against a ring around the box.
    for scene in scenes(20):
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            distance = np.abs(scene.pixels - RGB[digit.colour]).sum(2)
            inside = distance[y0:y1, x0:x1]
            assert (inside < 0.6).mean() > 0.1
            for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
                # Every edge touches at least INK-opaque ink, hence leans to the colour.
                assert edge.min() < np.median(distance)


def test_paired_scenes_have_distinct_classes_and_a_pair() -> None:
    rng = np.random.default_rng(1)
    with_pair = 0
    for _ in range(50):
        scene = draw(rng, "validation", (4, 8), paired=True)
        labels = [digit.label for digit in scene.digits]
        colours = [digit.colour for digit in scene.digits]
        assert len(set(labels)) == len(labels)
        assert max(colours.count(c) for c in colours) <= 2
        with_pair += len(set(colours)) < len(colours)
    assert with_pair >= 48  # a crowded scene may lose a digit


def test_bins_keep_a_box_to_within_a_bin() -> None:
    for scene in scenes():
        for digit in scene.digits:
            back = from_bins(to_bins(digit.box))
            assert max(abs(a - b) for a, b in zip(back, digit.box, strict=True)) < BIN
            assert to_bins(back) == to_bins(digit.box)


def test_coverage_adds_up_to_the_box() -> None:
    for scene in scenes(10):
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            share = coverage(digit.box)
            assert share.shape == (GRID, GRID)
            assert share.sum() * PATCH**2 == pytest.approx((x1 - x0) * (y1 - y0))
            row, column = (int(low + high) // 2 // PATCH for low, high in ((y0, y1), (x0, x1)))
            assert share[row, column] > 0
