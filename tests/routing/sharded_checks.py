"""Checks of FSDP2, each of which runs in two processes with prompts of their own (``test_sharded``)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import torch.distributed as dist
from models import Sample, Tiny
from oracle import predict
from support import FEW, RULES, close, enable, generate, same_decisions, schedule
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import reroute
from reroute.errors import RerouteError
from reroute.rankers import FoldedAttention

BUILDERS: dict[str, Callable[..., Tiny]] = {"llava": models.llava, "qwen": models.qwen}


def sharded(tiny: Tiny, **settings: Any) -> Tiny:
    """Each layer by itself, and all else with the model."""
    for layer in tiny.model.model.language_model.layers:
        fully_shard(layer, **settings)
    fully_shard(tiny.model, **settings)
    return tiny


def prompts(tiny: Tiny) -> list[list[Sample]]:
    """What each process is asked: a picture and text of one length; text alone, which routes nothing."""
    return [[tiny.prompt(0, 5, tiny.grid, 4)], [tiny.prompt(1, 25)]]


def own(samples: list[list[Sample]]) -> list[Sample]:
    return samples[dist.get_rank()]


def check_text_beside_a_picture(folder: Path) -> None:
    """One process routes and the other does not: both get what they get alone, and nobody waits."""
    for name, build in BUILDERS.items():
        alone, tiny = build(), sharded(build())
        for samples in (own(prompts(tiny)), own(prompts(tiny)[::-1])):
            given = tiny.inputs(samples)
            for rules in (RULES[1], RULES[2], replace(RULES[0], score_layer_offset=-1)):
                with enable(alone, rules):
                    expected = alone.model(**given).logits
                with enable(tiny, rules) as handle:
                    got = tiny.model(**given).logits
                assert torch.equal(got, expected), name
                assert handle.stats().prefills == bool(samples[0].visual)
                if samples[0].visual:
                    same_decisions(handle.trace, [predict(alone, samples[0], rules)])
            assert torch.equal(tiny.model(**given).logits, alone.model(**given).logits)


def check_other_methods(folder: Path) -> None:
    """Those that look at other layers, or at nothing; each process has a picture of its own."""
    for name, build in BUILDERS.items():
        alone, tiny = build(), sharded(build())
        given = tiny.inputs([tiny.prompt(dist.get_rank(), 5, tiny.grid, 4 + dist.get_rank())])
        for method in ("diverse", "dart", "sparsevlm", "visionzip") if name == "llava" else ("diverse", "dart"):
            with reroute.enable(alone.model, method=method, keep=0.5):
                expected = alone.model(**given).logits
            with reroute.enable(tiny.model, method=method, keep=0.5) as handle:
                assert torch.equal(tiny.model(**given).logits, expected), method
            assert handle.stats().prefills == 1


def check_generation(folder: Path) -> None:
    """Layers that are sharded while routing is on; as many steps in each process."""
    alone, tiny = models.qwen(layers=5), models.qwen(layers=5)
    samples = [[tiny.prompt(0, 5, (3, 4), 4), tiny.prompt(2, 3, (2, 2), 4)], [tiny.prompt(1, 25)]]
    with enable(alone, FEW):
        expected = generate(alone, own(samples), 4)
    with enable(tiny, FEW) as handle:
        # Transformers encodes pictures before it calls the model, whose own weights stay whole from the first call on.
        sharded(tiny).model(**tiny.inputs([tiny.prompt(1, 3)]))
        got = generate(tiny, own(samples), 4)
        assert handle.stats().prefills == 1 - dist.get_rank()
    assert all(map(torch.equal, got.logits, expected.logits))
    with enable(tiny, FEW):
        assert all(map(torch.equal, generate(tiny, own(samples), 4).logits, expected.logits))


def check_settings_of_fsdp(folder: Path) -> None:
    """Weights in bf16, gathered ahead, and parts that are sharded by themselves and rank nothing."""
    alone, tiny = models.llava(layers=5), models.llava(layers=5)
    layers = tiny.model.model.language_model.layers
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for layer in layers:
        fully_shard(layer.mlp, mp_policy=policy)
    sharded(tiny, mp_policy=policy)
    for layer, following in itertools.pairwise(layers):
        layer.set_modules_to_forward_prefetch([following])
    for weight in alone.model.parameters():  # and no buffer
        weight.data = weight.data.to(torch.bfloat16)
    given = tiny.inputs(own(prompts(tiny)))
    with enable(alone, FEW):
        expected = alone.model(**given).logits
    with enable(tiny, FEW):
        close(tiny.model(**given).logits.float(), expected.float())


def check_gradients(folder: Path) -> None:
    """Of one prompt in both processes, whose mean is that of one."""
    alone, tiny = models.llava(layers=5), sharded(models.llava(layers=5))
    given = tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    for model in (alone, tiny):
        model.model.requires_grad_(True)
        with enable(model, FEW), torch.enable_grad():
            model.model(**given).logits.square().mean().backward()
    for expected, got in zip(alone.model.parameters(), tiny.model.parameters(), strict=True):
        if expected.grad is not None:
            close(got.grad.full_tensor(), expected.grad)


def check_refusals(folder: Path) -> None:
    """What would gather weights at another time than a process that does not route."""
    for path, named in (("self_attn.k_proj", "k_proj"), ("self_attn", "q_proj")):
        tiny = models.llava(layers=5)
        for layer in tiny.model.model.language_model.layers:
            fully_shard(layer.get_submodule(path))
        given = sharded(tiny).model, tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
        _refused(*given, f"'self_attn.{named}' of decoder layer 1 by itself", schedule=schedule(FEW))

    tiny = models.llava(layers=5)
    fully_shard(tiny.model.model.language_model.norm)
    for layer in tiny.model.model.vision_tower.encoder.layers:
        fully_shard(layer)
    given = sharded(tiny).model, tiny.inputs([tiny.prompt(0, 5, tiny.grid, 4)])
    _refused(*given, "the last norm of the decoder by itself", method="dart")
    _refused(*given, "computes with the weights of CLIPVision", method="visionzip")
    _refused(*given, "more than one matrix", schedule=schedule(FEW, FoldedAttention()))
    with enable(tiny, FEW) as handle, pytest.raises(RerouteError, match="FSDP2 gathers the decoder's weights when"):
        handle.warm_up(visual=16)


def _refused(model: Any, given: Any, sentence: str, **settings: Any) -> None:
    def routed() -> None:
        with reroute.enable(model, **settings):
            model(**given)

    with pytest.raises(RerouteError, match=sentence):
        routed()
    model(**given)


CHECKS = {name.removeprefix("check_"): its for name, its in list(globals().items()) if name.startswith("check_")}
