"""Pools of small pages."""

from __future__ import annotations

import torch

from reroute_kernels import PagedPool

PAGE = 4
WIDTH = 8
PAGE_BYTES = PAGE * WIDTH * 4


def make(max_pages: int | None = None) -> PagedPool:
    limit = None if max_pages is None else max_pages * PAGE_BYTES
    return PagedPool(WIDTH, torch.float32, "cpu", page_size=PAGE, max_bytes=limit)
