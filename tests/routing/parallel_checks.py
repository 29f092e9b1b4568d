"""Checks of tensor parallelism, each of which runs in two processes at once (``test_parallel``)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import models
import pytest
import torch
import torch.distributed as dist
from models import Tiny
from oracle import predict
from support import FEW, RULES, close, enable, generate, mixed_batch, rows, same_decisions, schedule
from torch import Tensor
from turns import first, turn
from two_processes import WORLD, same_everywhere

import reroute
from reroute.errors import RerouteError, UnsupportedModelError
from reroute.rankers import FoldedAttention, RankInputs, ScoreRanker
from reroute.rankers.base import DecoderAdapter

MODELS = ("llava-gqa", "qwen")


def whole(name: str) -> Tiny:
    """The model in one process."""
    return models.tiny(name)


@functools.cache
def _loaded(name: str, folder: Path) -> Tiny:
    tiny = whole(name)
    if dist.get_rank() == 0:
        tiny.model.save_pretrained(folder / name)
    dist.barrier()
    model = type(tiny.model).from_pretrained(folder / name, tp_plan="auto", dtype=torch.float32)
    return replace(tiny, model=model.eval().requires_grad_(False))


def split(name: str, folder: Path) -> Tiny:
    """The same model, half of the heads of which are in each process."""
    return _loaded(name, folder)


def check_against_the_oracle(folder: Path) -> None:
    """A batch with fillers and padding, each action: the tokens of one process, in both."""
    for name in MODELS:
        one, tiny = whole(name), split(name, folder)
        samples = mixed_batch(tiny)
        given = tiny.inputs(samples)
        assert tiny.model.model.language_model.layers[0].self_attn.q_proj(torch.zeros(1, 64)).shape[1] == 32
        for rules in (*RULES, replace(RULES[0], score_layer_offset=-1)) if tiny.is_qwen else RULES[:1]:
            expected = [predict(one, sample, rules) for sample in samples]
            with enable(tiny, rules) as handle:
                output = tiny.model(**given)
            same_decisions(handle.trace, expected)
            for got, its in zip(rows(output.logits, given["attention_mask"]), expected, strict=True):
                close(got, its.logits)
            for stage in handle.trace:
                for scores in stage.scores:
                    same_everywhere(scores)


def check_generation(folder: Path) -> None:
    """Tokens and caches; a step is that of the plain model on what is there."""
    for name in MODELS:
        one, tiny = whole(name), split(name, folder)
        samples = [tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(1, 2, tiny.grid, 3)]
        for settings in ({}, {"cache_implementation": "static"}):
            with enable(one, RULES[0]) as handle:
                expected, alone = generate(one, samples, 5, **settings), handle.stats()
            with enable(tiny, RULES[0]) as handle:
                got, stats = generate(tiny, samples, 5, **settings), handle.stats()
            assert torch.equal(got.sequences, expected.sequences)
            for one_step, its in zip(got.logits, expected.logits, strict=True):
                close(one_step, its)
            # Bytes are those of the process, and work is that of all.
            assert (2 * stats.kv_bytes, 2 * stats.kv_bytes_dense) == (alone.kv_bytes, alone.kv_bytes_dense)
            assert stats.layer_lengths == alone.layer_lengths
            assert (stats.prefill_flops, stats.scoring_flops) == (alone.prefill_flops, alone.scoring_flops)


def check_later_turns(folder: Path) -> None:
    """On what was chosen, and choosing again with a new picture."""
    for name, reopens in (("llava-gqa", True), ("qwen", True), ("qwen", False)):
        one, tiny = whole(name), split(name, folder)
        said, part = tiny.prompt(0, 5, tiny.grid, 4), tiny.prompt(2, 2, tiny.grid, 3)
        logits = []
        for model in (one, tiny):
            with enable(model, RULES[0], reopens=reopens) as handle:
                logits.append(turn(model, first(model, [said]), [said], [part]))
            if reopens:
                same_decisions(handle.trace, [predict(one, said + part, RULES[0])])
        close(logits[1], logits[0])


def check_other_methods(folder: Path) -> None:
    """Those that read all keys, or none; the choice is that of one process wherever its scores are not too close."""
    for name in MODELS:
        one, tiny = whole(name), split(name, folder)
        samples = [tiny.prompt(seed, 5, tiny.grid, 4) for seed in (0, 1)]
        for method in ("diverse", "dart", "sparsevlm"):
            kept = []
            for model in (one, tiny):
                with reroute.enable(model.model, method=method, keep=0.5, trace=True) as handle:
                    model.model(**model.inputs(samples))
                kept.append([torch.cat(stage.kept) for stage in handle.trace])
            for its, expected in zip(*kept[::-1], strict=True):
                same_everywhere(its)
                assert torch.equal(its, expected), f"{name}: {method}"


def check_plain(folder: Path) -> None:
    """With ``keep=1``, and once routing is off, it is the plain model to the bit."""
    for name in MODELS:
        tiny = split(name, folder)
        given = tiny.inputs(mixed_batch(tiny))
        plain = tiny.model(**given).logits
        with reroute.enable(tiny.model, keep=1.0):
            assert torch.equal(tiny.model(**given).logits, plain)
        with enable(tiny, RULES[0]):
            assert not torch.equal(tiny.model(**given).logits, plain)
        assert torch.equal(tiny.model(**given).logits, plain)


def check_gradients(folder: Path) -> None:
    """A forward that autograd records runs on distributed tensors."""
    tiny = split("llava-gqa", folder)
    given = tiny.inputs(mixed_batch(tiny))
    with enable(tiny, RULES[0]) as handle:
        expected, kept = tiny.model(**given).logits, [stage.kept for stage in handle.trace]
        tiny.model.requires_grad_(True)
        try:
            with torch.enable_grad():
                got = tiny.model(**given).logits
                got.square().mean().backward()
        finally:
            tiny.model.requires_grad_(False)
        assert "autograd" in handle.stats().backend_reason or handle.stats().backend == "torch"
        close(got.detach(), expected)
        for before, after in zip(kept, handle.trace, strict=True):
            assert all(map(torch.equal, before, after.kept))
        gradient = tiny.model.model.language_model.layers[7].self_attn.k_proj.weight.grad
        assert gradient is not None
        assert gradient.to_local().abs().sum() > 0
    tiny.model.zero_grad()


@dataclass(frozen=True)
class OfTheProcess(ScoreRanker):
    """Scores that no two processes share, as last bits of hidden states may not be."""

    def scores(self, inputs: RankInputs) -> list[Tensor]:
        generator = torch.Generator().manual_seed(dist.get_rank())
        return [torch.rand(len(hidden), generator=generator) for hidden in inputs.hidden]


class FailsInTheSecond(OfTheProcess):
    def check(self, adapter: DecoderAdapter, layer: int) -> None:
        if dist.get_rank() == 1:
            raise OSError


def check_agreement(folder: Path) -> None:
    """Whatever each process ranks by, they choose alike."""
    tiny = split("llava-gqa", folder)
    given = tiny.inputs(mixed_batch(tiny))
    for rules in (RULES[0], RULES[2]):
        with enable(tiny, rules, OfTheProcess()) as handle:
            output = tiny.model(**given)
        for stage in handle.trace:
            for kept in stage.kept:
                same_everywhere(kept)
        same_everywhere(output.logits)


def check_refused_together(folder: Path) -> None:
    """If one process cannot enable routing, or with other settings, none does, and nobody waits."""
    tiny, rank = split("llava-gqa", folder), dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setenv("REROUTE_BACKEND", "triton")
        sentence = "backend='triton' cannot run" if rank == 1 else "Process 1 of the tensor-parallel group cannot"
        with pytest.raises(Exception, match=sentence) as raised:
            enable(tiny, RULES[0])
        assert isinstance(raised.value, RerouteError) == (rank == 0)
    with pytest.raises(RerouteError, match=r"with the same settings\. process 0: route before \(2, 4, 6\)"):
        enable(tiny, RULES[rank])
    with pytest.raises(RerouteError if rank == 0 else OSError, match="OSError" if rank == 0 else None):
        enable(tiny, RULES[0], FailsInTheSecond())
    assert reroute.handle_of(tiny.model) is None
    with enable(tiny, RULES[0]) as handle:
        with pytest.raises(RerouteError, match="with the same settings"):
            enable(tiny, RULES[rank])
        assert handle.is_enabled
        tiny.model(**tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)]))
    assert handle.stats().prefills == 1


def check_refusals(folder: Path) -> None:
    """What cannot be right says so before anything runs."""
    tiny = split("llava-gqa", folder)
    with pytest.raises(RerouteError, match="more than one matrix"):
        reroute.enable(tiny.model, schedule=schedule(RULES[0], FoldedAttention()))
    with pytest.raises(RerouteError, match="spread over processes, each of which would write the same files"):
        reroute.calibrate(tiny.model, [], keep=0.5)
    plan = tiny.model.tp_plan
    tiny.model._tp_plan = {**plan, "model.language_model.norm": "sequence_parallel"}
    with pytest.raises(UnsupportedModelError, match="splits the rows of the prompt among processes"):
        enable(tiny, RULES[0])
    tiny.model._tp_plan = plan
    uneven = models.llava(kv_heads=1, layers=5)
    if dist.get_rank() == 0:
        uneven.model.save_pretrained(folder / "uneven")
    dist.barrier()
    model = type(uneven.model).from_pretrained(folder / "uneven", tp_plan="auto", dtype=torch.float32)
    with pytest.raises(UnsupportedModelError, match="has 4 query and 1 key/value heads, which 2 processes"):
        enable(replace(uneven, model=model), FEW)
    for module in model.modules():  # as some quantised ones, whose weights are local tensors
        for name, weight in list(module._parameters.items()):
            if hasattr(weight, "to_local"):
                module._parameters[name] = torch.nn.Parameter(weight.to_local(), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="none of its weights says which processes share them"):
        reroute.enable(model)


def check_spread_in_another_way(folder: Path) -> None:
    """PyTorch's own ``parallelize_module``, of which the model says nothing: refused at the first decision."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    tiny = models.llava(layers=5)
    colwise = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    for layer in tiny.model.model.language_model.layers:
        parallelize_module(layer, init_device_mesh("cpu", (WORLD,)), {**colwise, "self_attn.o_proj": RowwiseParallel()})
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    close(tiny.model(**given).logits, models.llava(layers=5).model(**given).logits)
    with enable(tiny, FEW), pytest.raises(RerouteError, match=r"layer 1 return 2 query and 1 key heads, .* 4 and 2"):
        tiny.model(**given)


CHECKS = {name.removeprefix("check_"): its for name, its in list(globals().items()) if name.startswith("check_")}
