from __future__ import annotations

import torch

from reroute.demo import tinyvlm
from reroute.demo.tinyvlm.conditions import CONDITIONS, noise
from reroute.demo.tinyvlm.evaluation import prompts
from reroute.demo.tinyvlm.examples import examples

MODEL, PROCESSOR = tinyvlm.load()
CHOSEN = examples("validation", {"attr": 3})


def tokens(order: list[int]) -> torch.Tensor:
    """What the projector makes of some pictures in one batch: (B, N, C)."""
    seen: list[torch.Tensor] = []
    hook = MODEL.model.multi_modal_projector.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        MODEL(**prompts(MODEL, PROCESSOR, [CHOSEN[i] for i in order]))
    hook.remove()
    return seen[0]


def test_noise_is_relative_to_the_size_of_the_tokens() -> None:
    clean = tokens([0, 1, 2])
    for name, sigma in (("noise-0.5", 0.5), ("noise-1", 1.0)):
        with CONDITIONS[name].on(MODEL):
            added = tokens([0, 1, 2]) - clean
        rms = clean.square().mean((1, 2)).sqrt()
        torch.testing.assert_close(added.square().mean((1, 2)).sqrt(), sigma * rms, rtol=0.02, atol=0)
        assert added.mean().abs() < 0.02 * rms.mean()
    assert torch.equal(tokens([0, 1, 2]), clean)


def test_noise_is_that_of_the_picture_whatever_the_batch() -> None:
    with noise(MODEL, 1.0):
        together, turned, alone = tokens([0, 1, 2]), tokens([2, 0]), tokens([1])
    torch.testing.assert_close(turned, together[[2, 0]])
    torch.testing.assert_close(alone, together[1:2])
    with noise(MODEL, 1.0, seed=1):
        assert not torch.allclose(tokens([1]), alone)


def test_pictures_have_noise_of_their_own() -> None:
    clean = tokens([0, 1])
    with noise(MODEL, 1.0):
        first, second = tokens([0, 1]) - clean
    assert torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1].abs() < 0.05


def test_clutter_is_fuller_and_leaves_other_questions_alone() -> None:
    counts = {"attr": 10, "hop": 10}
    clean, full = (CONDITIONS[name].examples("validation", counts) for name in ("clean", "clutter"))
    assert [e.question for e in clean] == [e.question for e in examples("validation", counts)]
    assert min(len(e.digits) for e in full) >= 8
    assert sum(len(e.digits) for e in full) >= 9 * len(full)
    assert len({e.question for e in full}) > 10
