"""SparseVLM as its authors' code computes it, stage by stage: raters, scores, what is kept, and what is recycled."""

from __future__ import annotations

import functools
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reroute.methods import SparseVLM
from reroute.rankers.rater_attention import by_raters, mean_of_heads, raters_of, rope_of_ones
from reroute.rankers.recycling import centres_of, clusters_of, density_of, labels_of, num_kept, num_recycled, recycle

HERE = Path(__file__).parent


@functools.cache
def case(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Its parameters and its tensors."""
    parameters: dict[str, Any] = json.loads((HERE / name / "case.json").read_text())["params"]
    return parameters, load_file(HERE / name / "case.safetensors")


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


def distances(tokens: Tensor) -> Tensor:
    apart: Tensor = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / tokens.shape[1] ** 0.5
    return apart


def stages(name: str) -> list[tuple[int, int, int]]:
    """Of a case: layer, number of visual tokens that come, number that go on."""
    its, _ = case(name)
    counts = its["counts"]
    return list(zip(its["pruning_layers"], counts, counts[1:], strict=False))


CASES = ["method_sparsevlm_v15", "method_sparsevlm_rank", "method_sparsevlm_v2"]
STAGES = [(name, *stage) for name in CASES for stage in stages(name)]


@pytest.mark.parametrize("name", CASES)
def test_raters(name: str) -> None:
    its, given = case(name)
    embeds, begin, end = given["in.embeds"][0], its["visual_start"], its["visual_start"] + its["N"]
    raters = raters_of(embeds[begin:end], embeds[end:])
    assert torch.equal(raters.nonzero().flatten(), given["out.raters"])


def test_one_token_is_the_rater() -> None:
    """The original has none then, and scores of NaN; nor has it any among tokens that are all alike."""
    visual = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    for question in (torch.ones(1, 4), torch.ones(4, 4)):
        assert raters_of(visual, question).all()


@pytest.mark.parametrize(("name", "layer", "n", "k"), STAGES)
def test_stages(name: str, layer: int, n: int, k: int) -> None:
    """The states of the next layer, but for the place of clusters: the authors' are behind all others."""
    its, given = case(name)
    begin, question = its["visual_start"], given[f"in.attn_l{layer}"].shape[-1] - its["text_after"]
    visual = slice(begin, begin + n)
    attention = given[f"in.attn_l{layer}"][0, :, question:, visual]
    raters = torch.zeros(its["text_after"], dtype=torch.bool).index_fill(0, given["out.raters"], True)
    if name.endswith("v2"):
        before = [layer for layer, *_ in stages(name) if f"out.positions_l{layer}" in given]
        last = [other for other in before if other < layer]
        positions = given[f"out.positions_l{last[-1]}"] if last else torch.arange(question + its["text_after"])
        angles = positions[:, None] * 10000.0 ** (-torch.arange(0, its["head_dim"], 2) / its["head_dim"])
        cos, sin = (turn(torch.cat([angles, angles], 1)) for turn in (torch.cos, torch.sin))
        divisor = rope_of_ones(cos[question:], sin[question:], cos[visual], sin[visual])
        per_head = by_raters(attention, raters, divisor)
        assert torch.equal(per_head.sum(1).topk(14).indices.sort().values, given[f"out.heads_l{layer}"])
        score = mean_of_heads(per_head, 14)
    else:
        score = mean_of_heads(by_raters(attention, raters))
    close(score, given[f"out.score_l{layer}"])
    order = score.sort(descending=True, stable=True).indices
    kept = given[f"out.kept_l{layer}"]
    own = k if name.endswith("v2") else num_kept(n, k)
    if k < n:  # else one token is recycled as itself: nothing has changed
        assert torch.equal(order[:own].sort().values, kept)
    if name.endswith("v2") or k == n:
        return
    recycled = order[own : own + num_recycled(n - own)]
    assert torch.equal(recycled, given[f"out.recycled_l{layer}"])
    earlier = [other for other, *_ in stages(name) if other < layer]
    states = given[f"out.hidden_l{earlier[-1]}"] if earlier else given["in.embeds"][0]
    tokens, count = states[visual][recycled], k - own
    apart = distances(tokens)
    centres = centres_of(apart, density_of(apart, count), count)
    if f"out.centres_l{layer}" in given:
        assert torch.equal(centres, given[f"out.centres_l{layer}"])
    assert torch.equal(labels_of(apart, centres), given[f"out.cluster_l{layer}"])
    passed = given[f"out.hidden_l{layer}"][begin : begin + k]
    close(clusters_of(tokens, count), passed[own:])
    ours = recycle(states[visual], order, k)
    close(ours[kept], passed[:own])
    close(ours[order[own:k].sort().values], passed[own:])


def test_clusters() -> None:
    """With the noise of the authors' code: of two clusters densities are equal in pairs, and noise decides."""
    _, given = case("method_sparsevlm_cluster")
    apart = distances(given["in.tokens"])
    density = density_of(apart, 2)
    centres = centres_of(apart, density + 1e-6 * given["in.noise"], 2)
    assert torch.equal(centres, given["out.centres"])
    labels = labels_of(apart, centres)
    assert torch.equal(labels, given["out.labels"])
    means = torch.stack([given["in.tokens"][labels == c].mean(0) for c in (0, 1)])
    close(means, given["out.merged"])


def test_equal_densities() -> None:
    """The first counts as denser; one cluster is the mean, wherever its centre is."""
    tokens = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0]])
    apart = distances(tokens)
    assert density_of(apart, 2)[:4].unique().numel() == 1
    assert centres_of(apart, density_of(apart, 2), 2).tolist() == [0, 2]
    close(clusters_of(tokens, 2), torch.tensor([[0.5], [17.0]]))
    close(clusters_of(tokens, 1), torch.tensor([[10.4]]))
    close(
        clusters_of(torch.ones(6, 3), 3),
        torch.ones(3, 3) * torch.tensor([[4.0], [1], [1]]) / torch.tensor([[4.0], [1], [1]]),
    )


def test_counts() -> None:
    """T15, and what of it are clusters."""
    for row in json.loads((HERE / "method_sparsevlm_counts" / "case.json").read_text())["rows"]:
        version = row["version"][1:]
        schedule = SparseVLM.official(row["nominal"], version).schedule(32, "remove")
        per_layer = schedule.per_layer(576, 32)
        for layers, count in row["layer_input_counts"].items():
            first, last = map(int, layers.split("-"))
            assert per_layer[first : last + 1] == [count] * (last + 1 - first)
        assert sum(per_layer) / 32 == row["avg_layer_input"]
        if version == "1.5":
            before = [576, *schedule.counts(576)]
            assert [num_kept(*pair) for pair in pairwise(before)] == row["table"]
    assert SparseVLM().schedule(32, "remove").counts(576) == (309, 204, 113)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 16, 60, 576])
def test_any_count(n: int) -> None:
    """Tokens that stay and clusters are k, whatever k is; where half of them would be clusters, just half are."""
    for k in {*range(0, n, 1 + n // 40), n}:
        own = num_kept(n, k)
        clusters = k - own
        assert 0 <= clusters <= k // 2
        assert clusters <= num_recycled(n - own) <= n - own or not clusters
        assert own == k if k == n else clusters in (k // 2, num_recycled(n - own) // 10 + 1)
        states = torch.arange(2.0 * n).view(n, 2)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(k))
        changed = (recycle(states, order, k) != states).any(1).nonzero().flatten().tolist()
        assert set(changed) <= set(order[own:k].tolist())
