"""What published methods make of a picture, by their authors' code: VisionZip, VScan and CDPruner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from given import case, close, llava_around
from models import CACHE
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import CLIPVisionConfig, CLIPVisionModel, LlavaConfig

import reroute
from reroute.errors import RerouteError
from reroute.methods import VScan
from reroute.rankers import ClipRelevance, LastTokenAttention, LocalGlobal, RankInputs, ScoreRanker, TowerShape
from reroute.rankers.conditional_diversity import determinant_picks, normalised_relevance
from reroute.rankers.dominant_contextual import choose
from reroute.rankers.local_global import _best, best_local, take_up_all
from reroute.rankers.merging import absorb, nearest
from reroute.rankers.pictures import Picture
from reroute.transformers.vision import ClipTower, TowerRun
from reroute_kernels import AttentionSpec, RMSNorm, RopeTables, SelectMetadata, SelectRows, reference


def places(mask: Tensor) -> list[int]:
    return mask.nonzero().flatten().tolist()


# --- VisionZip --------------------------------------------------------------------------------------------------------


def tower_of_one_layer(its: dict[str, Any], given: dict[str, Tensor]) -> ClipTower:
    """A tower whose layer attends with the weights of the case, and has no norm before that."""
    side = math.isqrt(its["patches"])
    config = CLIPVisionConfig(
        hidden_size=its["embed"],
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=its["heads"],
        image_size=side,
        patch_size=1,
    )
    model: Any = CLIPVisionModel(config)
    model.eval().requires_grad_(False)
    layer = model.encoder.layers[0] if hasattr(model, "encoder") else model.vision_model.encoder.layers[0]
    layer.layer_norm1 = nn.Identity()
    for name in ("q", "k"):
        projection = getattr(layer.self_attn, f"{name}_proj")
        projection.load_state_dict({"weight": given[f"in.{name}_weight"], "bias": given[f"in.{name}_bias"]})
    return ClipTower(model, nn.Identity(), LlavaConfig(vision_config=config))


def test_visionzip() -> None:
    its, given = case("method_visionzip")
    tower, patches = tower_of_one_layer(its, given), its["patches"]
    run = TowerRun(tower, [[(6, 6)]] * its["B"], {0})
    run.states[0] = given["in.h_ln"]
    attention = tower.attention(run, 0).unflatten(1, (its["B"], patches)).transpose(0, 1)
    close(attention, given["out.attn_cls"][:, :, 1:], 1e-6)
    keys = tower.keys(run, 0).mean(1).unflatten(0, (its["B"], patches))
    close(keys, given["out.metric"][:, 1:], 1e-6)
    dominant, contextual = its["dominant_incl_cls"], its["contextual"]
    for b in range(its["B"]):
        choice = choose(attention[b].sum(0), keys[b], dominant - 1, contextual)
        assert [0, *(1 + choice.dominant).tolist()] == given["out.dominant"][b].tolist()
        assert (1 + choice.contextual).tolist() == given["out.context_targets"][b].tolist()
        targets = torch.where(choice.takes < 0, -1, 1 + choice.contextual[choice.takes])
        targets[choice.contextual] = 1 + choice.contextual
        assert targets.tolist() == given["out.assign"][b, 1:].tolist()
        states = given["in.hidden"][b]
        tokens = [states[:1], states[1:][choice.dominant], absorb(states[1:], choice.contextual, choice.takes)]
        close(torch.cat(tokens), given["out.tokens"][b], 1e-5)


def test_visionzip_by_hand() -> None:
    """T12."""
    attended = torch.tensor([0.05, 0.30, 0.02, 0.20, 0.03, 0.10, 0.01, 0.08])
    angles = torch.tensor([0, 10, 10, 80, 85, 30, 95, 60]).deg2rad()
    choice = choose(attended, torch.stack([angles.cos(), angles.sin()], 1), 2, 2)
    assert (1 + choice.dominant).tolist() == [2, 4]
    assert (1 + choice.contextual).tolist() == [1, 6]
    assert choice.takes.tolist() == [-1, -1, 0, -1, 1, -1, 1, 1]
    made = absorb(torch.arange(1.0, 9.0)[:, None], choice.contextual, choice.takes)
    close(made.flatten(), torch.tensor([4, 12.666667]), 1e-5)


def test_of_equal_tokens_the_first() -> None:
    """Dominant ones, and the contextual token that takes up the others."""
    choice = choose(torch.ones(10), torch.ones(10, 3), 3, 2)
    assert choice.dominant.tolist() == [0, 1, 2]
    assert choice.contextual.tolist() == [3, 6]
    assert choice.takes.tolist() == [-1, -1, -1, -1, 0, 0, -1, 0, 0, 0]


@pytest.mark.parametrize(("dominant", "contextual"), [(0, 0), (0, 1), (0, 5), (4, 1), (4, 0), (1, 4)])
def test_budgets_at_the_border(dominant: int, contextual: int) -> None:
    """Down to nothing that could be taken up, or taken up by none."""
    torch.manual_seed(0)
    keys, states = torch.randn(5, 3), torch.randn(5, 2)
    choice = choose(torch.rand(5), keys, dominant, contextual)
    assert len(choice.dominant) == dominant
    assert len(choice.contextual) == contextual
    assert not set(choice.dominant.tolist()) & set(choice.contextual.tolist())
    if contextual:
        made = absorb(states, choice.contextual, choice.takes)
        taken = [states[choice.takes == i] for i in range(contextual)]
        expected = [states[p] + (t.mean(0) if len(t) else 0) for p, t in zip(choice.contextual, taken, strict=True)]
        close(made, torch.stack(expected), 1e-6)


# --- VScan ------------------------------------------------------------------------------------------------------------


def test_vscan_of_llava() -> None:
    its, given = case("method_vscan_llava")
    near, far = (given[f"in.attn_l{layer}"][0].mean(0) for layer in (5, 22))
    image = Picture((24, 24), slice(0, 576), slice(0, its["T"]))
    local = best_local(near, image.grid, its["T"] // 2, 6, evenly=True)
    assert places(local) == given["out.local"][0].tolist()
    kept = _best(near, far, image, evenly=True)
    assert places(kept) == given["out.kept"][0].tolist()
    close(take_up_all(given["in.features"][0], given["out.kept"][0]), given["out.merged"][0], 1e-5)
    takes = nearest(given["in.features"][0], given["out.kept"][0])
    assert given["out.kept"][0][takes].tolist() == given["out.assign"][0].tolist()


def test_vscan_of_qwen() -> None:
    its, given = case("method_vscan_qwen")
    image = Picture(tuple(its["grid_merged"]), slice(0, 120), slice(0, its["n"]))
    near, far = given["in.attn_local"], given["in.attn_global"]
    local = best_local(near, image.grid, its["n_local"], its["window"], evenly=False)
    assert places(local) == sorted(given["out.local"].tolist())
    kept = _best(near, far, image, evenly=False)
    assert places(kept) == given["out.kept"].tolist()
    close(take_up_all(given["in.features"], given["out.kept"]), given["out.merged"], 1e-5)


def test_of_equal_tokens_the_first_of_each_window() -> None:
    """Of 13 x 8 and windows of 6: two of them; of 4: six of them, of which the last ones are larger."""
    alike = torch.ones(104)
    assert places(best_local(alike, (13, 8), 5, 6, evenly=True)) == [0, 1, 48, 49]
    assert places(best_local(alike, (13, 8), 8, 4, evenly=False)) == [0, 1, 4, 5, 32, 33, 36, 37]
    assert places(best_local(alike, (13, 8), 7, 4, evenly=False)) == [0, 1, 4, 5, 32, 33, 36]
    image = Picture((13, 8), slice(0, 104), slice(0, 10))
    assert places(_best(alike, alike, image, evenly=True)) == [0, 1, 2, 3, 4, 5, 6, 7, 48, 49]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 5), (6, 6), (7, 11), (24, 24), (23, 12)])
@pytest.mark.parametrize("evenly", [True, False])
def test_counts_on_odd_grids(grid: tuple[int, int], evenly: bool) -> None:
    n, side = grid[0] * grid[1], 6 if evenly else 4
    generator = torch.Generator().manual_seed(0)
    near, far = torch.rand(2, n, generator=generator)
    windows = max(1, grid[0] // side) * max(1, grid[1] // side)
    for k in range(0, n + 1, max(1, n // 12)):
        assert len(places(_best(near, far, Picture(grid, slice(0, n), slice(0, k)), evenly=evenly))) == k
        count = k // 2 // windows * windows if evenly else k // 2
        assert len(places(best_local(near, grid, k // 2, side, evenly=evenly))) == count


def test_published_counts_of_vscan() -> None:
    """T15: 3 of each of 16 windows and 48 others, then 32 of them. With T = 100 the authors keep 98."""
    assert VScan.official().schedule(32, "remove").counts(576) == (96, 32)
    near, far = torch.rand(2, 576, generator=torch.Generator().manual_seed(0))
    assert len(places(best_local(near, (24, 24), 98 // 2, 6, evenly=True))) == 48
    kept = _best(near, far, Picture((24, 24), slice(0, 576), slice(0, 98)), evenly=True)
    local = best_local(near, (24, 24), 100 // 2, 6, evenly=True)
    assert places(kept & ~local) == sorted(far.masked_fill(local, 0).topk(50).indices.tolist())


def test_the_second_stage_of_vscan_for_qwen() -> None:
    """Its layer's norm, query and keys, and no rotation."""
    parameters, given = case("method_vscan_qwen")
    its, states = parameters["llm"], given["in.llm_states"][0]
    heads, length = {"q": its["heads"], "k": its["kv_heads"]}, len(states)
    normed = RMSNorm(given["in.llm_norm"], its["rms_eps"])(states)
    query, keys = (
        linear(normed, given[f"in.llm_{x}_weight"], given[f"in.llm_{x}_bias"]).unflatten(1, (count, -1))
        for x, count in heads.items()
    )
    visual = torch.arange(its["visual_start"], length - its["text_after"])[None]
    texts = torch.tensor([*range(its["visual_start"]), *range(length - its["text_after"], length)])[None]
    counts = SelectMetadata((0,), (length,), (visual.shape[1],), (texts.shape[1],), (its["keep"],))
    angles = torch.rand(length, its["head_dim"])
    context: Any = SimpleNamespace(
        adapter=SimpleNamespace(
            project_own=lambda layer, rows, tables: (query[tables.query_rows], keys),
            attention_spec=lambda layer: AttentionSpec(its["head_dim"] ** -0.5),
        ),
        decision=SimpleNamespace(score_layer=0),
        tables=RopeTables(angles.cos(), angles.sin(), torch.tensor([length - 1])),
        normed=lambda: normed,
        rows=SelectRows(visual, texts, torch.arange(length), counts),
        backend=reference,
    )
    selection = LastTokenAttention(rotates=False).select(context)
    assert selection.kept[0].tolist() == given["out.llm_kept"].tolist()
    close(selection.scores[0], given["out.llm_score"], 1e-5)
    assert torch.equal(given["in.llm_positions"][..., selection.active_positions[0]], given["out.llm_positions"])
    assert not torch.allclose(LastTokenAttention().select(context).scores, selection.scores, atol=1e-4)


@dataclass(frozen=True)
class All(ScoreRanker):
    """Keeps all of them."""

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        return [torch.ones(len(hidden)) for hidden in inputs.hidden]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_second_stage_of_vscan_for_llava(attention: str) -> None:
    its, given = case("method_vscan_llava_llm")
    model = llava_around(
        given,
        intermediate_size=its["mlp"],
        num_hidden_layers=its["layers"],
        num_attention_heads=its["heads"],
        num_key_value_heads=its["kv_heads"],
        rms_norm_eps=its["rms_eps"],
    )
    model.set_attn_implementation(attention)
    embeds = given["in.embeds"]
    ids = torch.ones(embeds.shape[:2], dtype=torch.int64)
    ids[:, its["visual_start"] :][:, : its["N"]] = its["vocab"]
    method = VScan((1.0, its["keep_counts"][0] / its["N"]), layer=2, position_mode="renumbered", first=All())
    with reroute.enable(model, method=method, action="remove", trace=True) as handle:
        with handle.using(handle.plan(ids)):
            out = model(inputs_embeds=embeds, use_cache=True)
        assert handle.trace is not None
        assert handle.trace[1].kept[0].tolist() == given["out.kept_l2"].tolist()
        close(handle.trace[1].scores[0], given["out.score_l2"], 1e-5)
        cache, logits = getattr(out, CACHE), [out.logits[0, -1]]
        assert [layer.keys.shape[-2] for layer in cache.layers] == [36, 36, 20, 20]
        logits += [model(token[None, None], **{CACHE: cache}).logits[0, -1] for token in given["in.decode_tokens"]]
    close(torch.stack(logits)[:, :-1], given["out.logits"], 1e-4)


# --- CDPruner ---------------------------------------------------------------------------------------------------------


def test_cdpruner() -> None:
    its, given = case("method_cdpruner")
    vision: Any = SimpleNamespace(shape=SimpleNamespace(features=(1,)), states=lambda index: [torch.eye(its["N"])])
    embed = ClipRelevance(lambda x: x @ given["in.clip_image"][0], given["in.clip_text"])
    everyone = [torch.arange(its["N"])]
    inputs = RankInputs([torch.zeros(its["N"], 1)], torch.zeros(1, 1), 0, 0, everyone, vision)
    relevance = normalised_relevance(embed.scores(inputs)[0])
    close(relevance, given["out.relevance"][0], 1e-6)
    picks = determinant_picks(given["in.features"][0], relevance, its["T"])
    assert picks.tolist() == given["out.order"][0].tolist()
    assert picks.sort().values.tolist() == given["out.kept"][0].tolist()


ANGLES = torch.tensor([0, 10, 50, 100, 115, 170]).deg2rad()
CIRCLE = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)


def test_cdpruner_by_hand() -> None:
    """T13, and behind the rank of two the most relevant of the others."""
    relevance = normalised_relevance(-torch.tensor([0.10, 0.12, 0.30, 0.20, 0.25, 0.05]))
    close(relevance, torch.tensor([0.800004, 0.720004, 0.000004, 0.400004, 0.200004, 1.000004]), 1e-6)
    assert determinant_picks(CIRCLE, relevance, 6).tolist() == [5, 3, 0, 1, 4, 2]


def test_several_texts_are_averaged() -> None:
    vision: Any = SimpleNamespace(shape=SimpleNamespace(features=(1,)), states=lambda index: [CIRCLE, CIRCLE[:0]])
    everyone = [torch.arange(6), torch.arange(0)]
    inputs = RankInputs([CIRCLE, CIRCLE[:0]], torch.zeros(2, 1), 0, 0, everyone, vision)
    first, none = ClipRelevance(lambda x: 3 * x, 2 * CIRCLE[:2]).scores(inputs)
    close(first, -(CIRCLE @ CIRCLE[:2].T).mean(1), 1e-6)
    assert not len(none)
    close(ClipRelevance(lambda x: x, [CIRCLE[:2], CIRCLE[3:4]]).scores(inputs)[0], first, 1e-6)
    with pytest.raises(RerouteError, match=r"texts for 1 samples, and the call has 2"):
        ClipRelevance(lambda x: x, [CIRCLE]).scores(inputs)
    for wrong in ({"pooler_output": CIRCLE}, CIRCLE[0], [None], "a cup"):
        with pytest.raises(RerouteError, match=r"get_text_features\(…\).pooler_output"):
            ClipRelevance(lambda x: x, wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("relevance", [torch.ones(6), torch.arange(6.0)])
def test_each_token_is_picked_once(relevance: Tensor) -> None:
    """Also where all are alike: then by relevance, of equals the first."""
    for k in range(7):
        picks = determinant_picks(torch.ones(6, 4), normalised_relevance(relevance), k).tolist()
        assert picks == relevance.argsort(descending=True, stable=True)[:k].tolist()


def test_behind_the_rank_come_the_most_relevant() -> None:
    """Of three dimensions all but three, whatever rounding leaves of them."""
    generator = torch.Generator().manual_seed(0)
    hidden, relevance = torch.randn(60, 3, generator=generator), torch.rand(60, generator=generator)
    picks = determinant_picks(hidden, relevance, 60).tolist()
    rest = [i for i in relevance.argsort(descending=True).tolist() if i not in picks[:3]]
    assert picks[3:] == rest


def test_relevance_without_differences() -> None:
    assert normalised_relevance(torch.full((3,), 0.2)).tolist() == [1, 1, 1]
    assert normalised_relevance(torch.ones(1)).tolist() == [1]
    assert normalised_relevance(torch.ones(0)).tolist() == []


def test_picks_make_the_largest_determinant() -> None:
    """Step by step, by determinants in fp64."""
    generator = torch.Generator().manual_seed(0)
    hidden, relevance = torch.randn(12, 16, generator=generator), torch.rand(12, generator=generator)
    unit = torch.nn.functional.normalize(hidden.double(), dim=-1)
    kernel = relevance.double()[:, None] * (unit @ unit.T) * relevance.double()
    picks: list[int] = []
    for _ in range(9):
        rest = [i for i in range(12) if i not in picks]
        picks.append(max(rest, key=lambda i: float(kernel[[*picks, i]][:, [*picks, i]].det())))
    assert determinant_picks(hidden, relevance, 9).tolist() == picks


@pytest.mark.parametrize(
    ("layers", "has_cls", "full", "features", "read"),
    [
        (24, True, range(24), (23,), [5, 22]),
        (6, True, range(6), (5,), [1, 4]),
        (32, False, (7, 15, 23, 31), (32,), [7, 31]),
        (4, False, (), (4,), [3, 3]),
    ],
)
def test_layers_that_vscan_reads(layers: int, has_cls: bool, full: Any, features: Any, read: list[int]) -> None:
    tower = TowerShape(layers, 8, 1, has_cls, 1 if has_cls else 4, tuple(full), features, 1)
    assert LocalGlobal().tower_states(tower) == read


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_has_many_ties(dtype: torch.dtype) -> None:
    """Of equal ones the first, in whatever is compared; aggregates are those of fp32, but for their rounding."""
    generator = torch.Generator().manual_seed(0)
    near, far = (torch.rand(2, 144, generator=generator) / 64).mul(2**12).round().div(2**12).to(dtype)
    assert len(far.unique()) < 70
    keys, states = (torch.randn(144, 8, generator=generator).to(dtype) for _ in range(2))
    choice = choose(far, keys, 20, 5)
    assert choice.dominant.tolist() == sorted(sorted(range(144), key=lambda i: (-float(far[i]), i))[:20])
    made = absorb(states, choice.contextual, choice.takes)
    assert made.dtype == dtype
    close(made.float(), absorb(states.float(), choice.contextual, choice.takes), 0.05)
    image = Picture((12, 12), slice(0, 144), slice(0, 30))
    local = []
    for corner in (0, 6, 72, 78):
        window = [corner + 12 * row + column for row in range(6) for column in range(6)]
        local += sorted(window, key=lambda i: (-float(near[i]), i))[:3]
    rest = sorted(set(range(144)) - set(local), key=lambda i: (-float(far[i]), i))
    kept = torch.tensor(sorted([*local, *rest[:18]]))
    assert places(_best(near, far, image, evenly=True)) == kept.tolist()
    whole = take_up_all(states, kept)
    assert whole.dtype == dtype
    close(
        whole.float(), absorb(states.float(), kept, nearest(states, kept).index_fill(0, kept, -1), averages=True), 0.05
    )
