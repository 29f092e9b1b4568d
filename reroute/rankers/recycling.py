"""What is pruned and still scores well goes on as the means of a few clusters: the recycling of SparseVLM."""

from __future__ import annotations

from math import floor

import torch

__all__ = ["centres_of", "clusters_of", "density_of", "labels_of", "num_kept", "num_recycled", "recycle"]


def num_recycled(pruned: int) -> int:
    """How many of the ``pruned`` tokens are clustered: the best three of ten."""
    return min(pruned, floor(0.3 * pruned) + 1)


def num_kept(n: int, k: int) -> int:
    """How many of ``n`` tokens stay as they are where ``k`` are to go on, clusters included; k if nothing is pruned.

    A tenth of the recycled tokens, and one more, are clusters. The released tables count without them: of 576 tokens,
    300 and 9 clusters are 309. Where so many would be most of ``k``, half of ``k`` are clusters.
    """
    fitting = (kept for kept in range(k, -1, -1) if kept + _num_clusters(n - kept) <= k)
    return max(next(fitting, 0), k - k // 2)


def _num_clusters(pruned: int) -> int:
    return num_recycled(pruned) // 10 + 1 if pruned else 0


def recycle(states: torch.Tensor, order: torch.Tensor, k: int) -> torch.Tensor:
    """``states`` (N, C) of which the first ``k`` in ``order`` (N,), the best first, are to be read.

    The last ones of these are clusters: they go on in the places of the best tokens that are recycled.
    """
    n, kept = len(states), num_kept(len(states), k)
    if kept == k:
        return states
    recycled = states.index_select(0, order[kept : kept + num_recycled(n - kept)])
    return states.index_copy(0, order[kept:k].sort().values, clusters_of(recycled, k - kept))


def clusters_of(tokens: torch.Tensor, count: int) -> torch.Tensor:
    """The means (count, C) of ``count`` clusters of ``tokens`` (r, C), in the order of ``centres_of``.

    Density peaks; distances are L2 over the root of C, in fp32.
    """
    wide = tokens.float()
    # Not by a matrix product: a token is at 0 from itself, and two are equally far from each other.
    distances = torch.cdist(wide, wide, compute_mode="donot_use_mm_for_euclid_dist") / wide.shape[1] ** 0.5
    centres = centres_of(distances, density_of(distances, count), count)
    # A product instead of adding up by index, whose order on a GPU is chance.
    members = (labels_of(distances, centres) == torch.arange(count, device=tokens.device)[:, None]).float()
    return (members @ wide / (members.sum(1, keepdim=True) + 1e-6)).to(tokens.dtype)


def density_of(distances: torch.Tensor, count: int) -> torch.Tensor:
    """Density (r,) by the ``distances`` (r, r) of the ``count`` nearest tokens, each itself among them."""
    return distances.topk(count, largest=False).values.square().mean(1).neg().exp()


def centres_of(distances: torch.Tensor, density: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` tokens (count,) of the largest density times distance from the nearest denser token; best first.

    Of equal densities the first counts as denser. The distance of the densest is the largest of all.
    """
    place, order = torch.empty_like(density, dtype=torch.int64), density.sort(descending=True, stable=True).indices
    place.index_copy_(0, order, torch.arange(len(order), device=order.device))
    is_denser = place < place[:, None]
    apart = torch.where(is_denser, distances, distances.amax()).amin(1)
    return (density * apart).sort(descending=True, stable=True).indices[:count]


def labels_of(distances: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
    """The number of its nearest centre for each token, (r,); a centre's own for itself."""
    nearest = distances.index_select(0, centres).argmin(0)
    return nearest.index_copy(0, centres, torch.arange(len(centres), device=centres.device))
