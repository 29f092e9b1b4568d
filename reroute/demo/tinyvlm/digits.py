"""The handwritten digits that the scenes are made of, and their honest split.

The 1,797 images of 8 x 8 pixels (values 0-16) are the test part of the UCI data set "Optical
Recognition of Handwritten Digits" (CC BY 4.0), as scikit-learn distributes it. They ship with the
package in `digits.npz`, so neither training nor evaluation needs scikit-learn. The file was
written by `python -m reroute.demo.tinyvlm.digits`, which does.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

Split = Literal["train", "validation", "test"]

FILE: Final = Path(__file__).with_name("digits.npz")
# The images are ordered by writer, so cutting the order keeps most writers on one side.
SPLITS: Final[dict[Split, range]] = {
    "train": range(0, 1200),
    "validation": range(1200, 1497),
    "test": range(1497, 1797),
}


@cache
def load() -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """The images, uint8 (1797, 8, 8) with values 0-16, and their labels, uint8 (1797,)."""
    with np.load(FILE) as archive:
        images, labels = archive["images"], archive["labels"]
    images.flags.writeable = labels.flags.writeable = False
    return images, labels


@cache
def indices(split: Split, label: int) -> npt.NDArray[np.int64]:
    """Indices of the images of one label in one split, ascending."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known splits are {', '.join(SPLITS)}")
    members = np.arange(SPLITS[split].start, SPLITS[split].stop)
    chosen: npt.NDArray[np.int64] = members[load()[1][members] == label]
    return chosen


def write(path: Path = FILE) -> None:
    """Write `digits.npz` from scikit-learn's copy of the data set."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images, labels = source.images.astype(np.uint8), source.target.astype(np.uint8)
    np.savez_compressed(path, images=images, labels=labels)


if __name__ == "__main__":
    write()
