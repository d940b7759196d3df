"""The span of stand-ins beside the plain span: what they share, and that neither is in the other's way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.models.tiny import CONFIGS, HIDDEN, N_LAYERS, tiny_checkpoint

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.runtime.sited_modules import InputRecorder, SitedLayer, SitedLinear, sites_active
from isthmus.backbone.split.span import FrozenSpan, load_span, sharing_copy


def span_of(family: str, folder: Path) -> FrozenSpan:
    return load_span(tiny_checkpoint(family, folder), SplitPlan.parse("2:2", N_LAYERS))


@pytest.mark.parametrize("family", CONFIGS)
def test_the_plain_span_stays_as_it_is_and_the_other_shares_its_weights(family: str, tmp_path: Path) -> None:
    span = span_of(family, tmp_path / "model")
    before = {name: type(module) for name, module in span.named_modules()}
    names, hidden = list(span.state_dict()), torch.randn(2, 12, HIDDEN)
    output = span(hidden)
    host = SiteHost(span)
    assert {name: type(module) for name, module in span.named_modules()} == before
    assert list(span.state_dict()) == names
    assert torch.equal(span(hidden), output)
    with sites_active(InputRecorder()):
        assert torch.equal(host.sited_span(hidden), output)
    weights = {each.data_ptr() for each in span.parameters()}
    assert {each.data_ptr() for each in host.sited_span.parameters()} == weights
    stand_ins = [type(module) for module in host.sited_span.modules()]
    assert stand_ins.count(SitedLayer) == N_LAYERS - 4
    assert stand_ins.count(SitedLinear) == sum(map(len, host.groups))


def test_only_a_pass_with_sites_comes_to_the_stand_ins(tmp_path: Path) -> None:
    host, hidden = SiteHost(span_of("llama", tmp_path / "model")), torch.randn(1, 3, HIDDEN)
    recorder = InputRecorder()
    with sites_active(recorder):
        host.span(hidden)
        assert recorder.inputs == []
        host.sited_span(hidden)
        assert len(recorder.inputs) == len(host.groups)


def test_a_copy_shares_tensors_and_later_hooks_and_no_submodules(tmp_path: Path) -> None:
    span, hidden = span_of("llama", tmp_path / "model"), torch.randn(1, 3, HIDDEN)
    layer = span.layers[0]
    copied = sharing_copy(layer)
    called: list[object] = []
    layer.mlp.act_fn.register_forward_hook(lambda *_: called.append(None))
    span.with_layers([copied, *list(span.layers)[1:]])(hidden)
    assert len(called) == 1
    copied.mlp.down_proj = torch.nn.Identity()
    assert layer.mlp.down_proj.weight.shape[0] == HIDDEN
    assert copied.mlp.up_proj.weight is layer.mlp.up_proj.weight
