"""Quantised weights: projections are called as the modules that they are, and rank by what they return."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from changes import check, decoder, prompt
from models import Tiny
from quantised import KINDS, WEIGHTS, quantise
from support import FEW, enable, schedule

import reroute
from reroute.calibration.state import digest_of
from reroute.errors import RerouteError
from reroute.rankers import FoldedAttention
from reroute.transformers.graphs.decoder_state import DecoderState


@pytest.mark.parametrize("kind", KINDS)
def test_the_oracle_of_the_quantised_model(own: Tiny, kind: str) -> None:
    before = own.model(**own.inputs([prompt(own)])).logits
    given = own.inputs([prompt(quantise(own, kind))])
    plain = own.model(**given).logits
    assert not torch.equal(plain, before), "nothing was quantised"
    with enable(own, FEW) as handle:
        check(own, handle)
    with enable(own, replace(FEW, ratios=(0.5, 0.5), action="remove")):
        assert not torch.equal(own.model(**given).logits, plain)
    with reroute.enable(own.model, keep=1.0):
        assert torch.equal(own.model(**given).logits, plain)
    assert torch.equal(own.model(**given).logits, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_rankers_that_need_the_matrix(own: Tiny, kind: str) -> None:
    """A quantised weight may have another shape, or refuse to be reshaped: its ranker refuses first, and later too."""
    with enable(own, FEW, FoldedAttention()):
        own.model(**own.inputs([prompt(own)]))
        KINDS[kind](decoder(own))
        with pytest.raises(RerouteError, match=r"more than one matrix .* or quantised or distributed weights"):
            own.model(**own.inputs([prompt(own)]))
    with pytest.raises(RerouteError, match="rank by LastTokenAttention"):
        reroute.enable(own.model, schedule=schedule(FEW, FoldedAttention()))


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_holds_the_weight(own: Tiny, kind: str) -> None:
    """Graphs read the addresses of what is inside, and a calibration tells models apart by it."""
    weight = decoder(quantise(own, kind)).layers[1].self_attn.k_proj.weight
    state, digest = DecoderState(decoder(own)), digest_of(own.model)
    assert state.still_is
    assert digest_of(own.model) == digest
    weight.qdata[0, 0] += 1
    assert state.still_is, "values may change"
    assert digest_of(own.model) != digest
    weight.qdata = weight.qdata.clone()
    assert not state.still_is
