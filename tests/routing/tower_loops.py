"""VisionZip, VScan and CDPruner, picture by picture in loops; nothing of the product but names of methods."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import models
import torch
from models import Sample, Tiny
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from towers import outputs_of_tower, tower_of

from reroute.methods import CDPruner, VisionZip, VScan
from reroute.rankers import ConditionalDiversity, DominantContextual, Norm

Made = tuple[list[int], Tensor]
"""What is kept of a picture, and the embeddings (k, C) with which it goes on."""

RATIO = 0.13
"""With more picks CDPruner's 23rd of a picture is a matter of rounding, and so of the CPU."""
METHODS: dict[str, Any] = {
    "visionzip": VisionZip((RATIO,), first=DominantContextual(0.4)),
    "vscan": VScan((RATIO, 0.05)),
    "cdpruner": CDPruner((RATIO,), first=ConditionalDiversity(Norm())),
}
CASES = [("visionzip", "llava"), ("vscan", "llava"), ("vscan", "qwen"), ("cdpruner", "llava"), ("cdpruner", "qwen")]


@functools.cache
def model(family: str) -> Tiny:
    """Towers whose early layer is not the late one, and pictures of several windows."""
    return (
        models.llava(side=13, layers=4, tower_layers=6) if family == "llava" else models.qwen(layers=4, tower_layers=4)
    )


def batch(tiny: Tiny) -> list[Sample]:
    """One picture, two, none; of odd sizes where the model takes them."""
    first, second, third = ((9, 7), (4, 5), (2, 3)) if tiny.is_qwen else [tiny.grid] * 3
    return [tiny.prompt(0, 5, first, 4), tiny.prompt(1, 2, second, 3, third, 2), tiny.prompt(2, 6)]


def all_routed(name: str, action: Any) -> Any:
    """With a ratio for each decision."""
    method = METHODS[name]
    return method if action == "remove" or name == "vscan" else replace(method, ratios=(RATIO, 0.3, 0.15))


def best(scores: Tensor, k: int, among: Any = None) -> list[int]:
    """In descending order."""
    return sorted(range(len(scores)) if among is None else among, key=lambda i: (-float(scores[i]), i))[:k]


def visionzip(
    tiny: Tiny, tower: Any, embeds: Tensor, grid: Any, k: int, *, share: float = 0.4, cls: bool = False
) -> Made:
    states, attention = tower[:2]
    contextual = round(k * share)
    layer = tower_of(tiny).encoder.layers[4]
    salience = attention[4].sum(0)
    dominant = sorted(best(salience, k - contextual - cls))
    rest = [i for i in range(len(salience)) if i not in dominant]
    targets = [rest[len(rest) // contextual * i] for i in range(contextual)]
    keys = layer.self_attn.k_proj(layer.layer_norm1(states[4])).view(len(salience), 2, -1).mean(1)
    members: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if targets and i not in targets:
            members[max(targets, key=lambda j: float(cosine_similarity(keys[i], keys[j], dim=0)))].append(i)
    made = {j: states[5][j] + states[5][of_it].sum(0) / max(1, len(of_it)) for j, of_it in members.items()}
    project = tiny.model.model.multi_modal_projector
    if cls:
        kept = sorted([*dominant, *targets, *best(salience, 1, set(rest) - set(targets))])
        return kept, torch.stack([project(tower[2]), *embeds[dominant], *(project(made[j]) for j in targets)])
    kept = sorted([*dominant, *targets])
    return kept, torch.stack([project(made[i]) if i in made else embeds[i] for i in kept])


def vscan(tiny: Tiny, tower: Any, embeds: Tensor, grid: Any, k: int) -> Made:
    local, late = (tower[1][layer].mean(0) for layer in ((1, 3) if tiny.is_qwen else (1, 4)))
    side = 4 if tiny.is_qwen else 6
    down, across = (max(1, length // side) for length in grid)
    windows: dict[Any, list[int]] = {}
    for i in range(len(local)):
        windows.setdefault((min(i // grid[1] // side, down - 1), min(i % grid[1] // side, across - 1)), []).append(i)
    chosen: list[int] = []
    if tiny.is_qwen:
        counts = dict.fromkeys(windows, 0)
        for i in best(local, len(local)):
            window = next(window for window, members in windows.items() if i in members)
            if len(chosen) < k // 2 and counts[window] < -(-(k // 2) // len(windows)):
                counts[window] += 1
                chosen.append(i)
    else:
        chosen = [i for members in windows.values() for i in best(local, k // 2 // len(windows), members)]
    kept = sorted([*chosen, *best(late, k - len(chosen), set(range(len(late))) - set(chosen))])
    sums = {i: [embeds[i]] for i in kept}
    for i in range(len(embeds)):
        if i not in sums:
            sums[kept[int((normalize(embeds[kept], dim=-1) @ normalize(embeds[i], dim=0)).argmax())]].append(embeds[i])
    return kept, torch.stack([torch.stack(taken).mean(0) for taken in sums.values()])


def cdpruner(tiny: Tiny, tower: Any, embeds: Tensor, grid: Any, k: int, *, relevance: Tensor | None = None) -> Made:
    relevance = (embeds.norm(dim=-1) if relevance is None else relevance).double()
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    unit = normalize(embeds.double(), dim=-1)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    picks: list[int] = []
    for _ in range(k):
        rest = [i for i in range(len(embeds)) if i not in picks]
        among, across = kernel[picks][:, picks], kernel[picks][:, rest]
        whole = kernel.diagonal()[rest]
        left = whole - (across * torch.linalg.solve(among, across)).sum(0)
        is_spanned = bool((left < 1e-9 * whole).all())
        picks.append(rest[int((relevance[rest] if is_spanned else left).argmax())])
    return sorted(picks), embeds[sorted(picks)]


LOOPS: dict[str, Callable[..., Made]] = {"visionzip": visionzip, "vscan": vscan, "cdpruner": cdpruner}


def by_loops(name: str, tiny: Tiny, sample: Sample, ratio: float = RATIO, **settings: Any) -> Made:
    """All pictures of a sample, of which each keeps its share."""
    sizes = [(rows // 2, columns // 2) for _, rows, columns in sample.grids] or [tiny.grid] * len(sample.pixels)
    kept, made, start = [], [], 0
    budget = max(1, int(len(sample.visual) * ratio))
    embeds = tiny.embeds(sample)[list(sample.visual)]
    for grid, pixels, outputs in zip(sizes, sample.pixels, outputs_of_tower(tiny, sample), strict=True):
        tower: Any = outputs
        if not tiny.is_qwen:
            tower = (*tower, tower_of(tiny)(pixels, output_hidden_states=True).hidden_states[5][0, 0])
        end = start + grid[0] * grid[1]
        k = budget * end // len(embeds) - budget * start // len(embeds)
        if k in (0, end - start):
            some, states = list(range(k)), embeds[start:end][:k]
        else:
            some, states = LOOPS[name](tiny, tower, embeds[start:end], grid, k, **settings)
        kept += [start + i for i in some]
        made.append(states)
        start = end
    return kept, torch.cat(made)
