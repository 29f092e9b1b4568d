"""What the page size of the pool costs: ``python -m bench.kernels.pages``. Counts and host times; no GPU is involved.

Small pages waste few rows behind a sample, but they scatter a prefill and make its page table long; a prefill
whose pages do not lie side by side must be gathered before the key projection.
"""

from __future__ import annotations

import random
import statistics
import time
from collections import deque

import torch

from reroute_kernels import Lease, PagedPool

SIZES = (1, 16, 32, 64, 128, 256)
IN_FLIGHT = 8
ROWS = 48 << 10  # the limit of the pool: what 8 prefills of this size need, and little more
WIDTH = 1  # the pool's memory plays no part here


def main() -> None:
    """Print a line for each page size, for the same stream of prefills."""
    print(f"{'page size':>9s}{'rows wasted':>13s}{'side by side':>14s}{'lease, µs':>11s}{'the same at 64k rows':>22s}")
    for size in SIZES:
        wasted, together, lease = stream(size)
        long = microseconds(PagedPool(WIDTH, torch.float32, "cpu", page_size=size), [65536])
        print(f"{size:9d}{wasted:13.2%}{together:14.1%}{lease:11.1f}{long:22.1f}")


def stream(page_size: int, prefills: int = 2000) -> tuple[float, float, float]:
    """Shares of rows that are page tails and of leases in consecutive pages, and the median time of a lease.

    Prompts of 300 to 3000 rows, in batches of 1 to 4; a random one of ``IN_FLIGHT`` ends when the next begins.
    """
    chance = random.Random(0)
    pool = PagedPool(WIDTH, torch.float32, "cpu", page_size=page_size, max_bytes=4 * WIDTH * ROWS)
    pool.lease([ROWS]).release()  # all its memory in one piece
    running: deque[Lease] = deque()
    rows = used = together = 0
    times = []
    for _ in range(prefills):
        lengths = [chance.randint(300, 3000) for _ in range(chance.randint(1, 4))]
        while len(running) == IN_FLIGHT or not fits(pool, sum(lengths) + 4 * page_size):
            running.rotate(chance.randrange(IN_FLIGHT))
            running.popleft().release()
        start = time.perf_counter()
        lease = pool.lease(lengths)
        times.append(time.perf_counter() - start)
        ids = lease.table.tolist()
        together += ids == list(range(ids[0], ids[0] + len(ids)))
        rows, used = rows + lease.num_rows, used + sum(lengths)
        running.append(lease)
    return 1 - used / rows, together / prefills, 1e6 * statistics.median(times)


def fits(pool: PagedPool, rows: int) -> bool:
    """Whether ``rows`` more rows are below the pool's limit."""
    stats = pool.stats()
    return stats.pages_in_use * stats.page_size + rows <= ROWS


def microseconds(pool: PagedPool, lengths: list[int], rounds: int = 50) -> float:
    """Median time of a lease from a warm pool."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        lease = pool.lease(lengths)
        times.append(time.perf_counter() - start)
        lease.release()
    return 1e6 * statistics.median(times)


if __name__ == "__main__":
    main()
