"""Calls with sites of the tiny model, and an edge that answers their questions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from support.models.tiny import HIDDEN
from support.protocol.span_messages import FP32
from torch import Tensor, nn

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_call import SiteCall
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.cloud.session.handler import TenantSession
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Role, decode, encode

SHAPE = (2, 6, HIDDEN)
WIDTHS = {"self_attn.q_proj": 32, "self_attn.v_proj": 16, "mlp.down_proj": 32, "": HIDDEN}


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def site(layer: int, part: str) -> Site:
    """An adapter that is a matrix of its own."""
    n_in = 64 if part == "mlp.down_proj" else HIDDEN
    module = nn.Linear(n_in, WIDTHS[part], bias=False)
    with torch.no_grad():
        module.weight.copy_(0.1 * tensor(WIDTHS[part], n_in, seed=layer + len(part)))
    return Site(f"model.layers.{layer}.{part}", SiteSpec(layer, part), module)


def q_and_v() -> list[Site]:
    return [site(layer, part) for layer in (2, 3) for part in ("self_attn.q_proj", "self_attn.v_proj")]


def bind(tenant: TenantSession, sites: Sequence[Site], number: int = 1) -> m.Message | None:
    return tenant.handle(m.Sites(number, tuple(SiteSpec(each.layer, each.part) for each in sites)))


def forward(*, call: int = 1, keep: bool = True, sites: int = 1, wanted: bool = True, seed: int = 0) -> m.Forward:
    hidden = encode(tensor(*SHAPE, seed=seed), "fp32", Role.ACTIVATION)
    return m.Forward(m.CallId(1, call), keep, hidden, None, None, FP32, sites, wanted)


def backward(*, call: int = 1, sites: int = 1, wanted: bool = True, replay: bool = False) -> m.Backward:
    gradient = encode(tensor(*SHAPE, seed=9), "fp32", Role.GRADIENT)
    inputs = m.SpanInputs(encode(tensor(*SHAPE), "fp32", Role.ACTIVATION)) if replay else None
    return m.Backward(m.CallId(1, call, 3), gradient, inputs, FP32, sites, wanted)


def answer(adapters: SiteCall, question: m.SiteQuestion) -> m.SiteAnswer:
    tensors = [decode(each).clone() for each in question.tensors]
    if question.phase in (m.SitePhase.FORWARD, m.SitePhase.AGAIN):
        given: Sequence[Tensor | None] = adapters.forward(
            question.sites, [tensors[0]] * len(question.sites) if tensors else None
        )
        role = Role.ACTIVATION
    else:
        given = adapters.backward(question.sites, tensors, wanted=question.phase == m.SitePhase.BACKWARD)
        role = Role.GRADIENT
    return m.SiteAnswer(question.id, tuple(encode(each, "fp32", role) for each in given if each is not None))


def converse(tenant: TenantSession, adapters: SiteCall, said: m.Message | None) -> tuple[m.Message | None, list[str]]:
    """Answer until there is no further question; returns what came then, and the phases of the questions."""
    phases = []
    while isinstance(said, m.SiteQuestion):
        phases.append(said.phase.name)
        said = tenant.handle(answer(adapters, said))
    return said, phases


def asked(said: m.Message | None) -> m.SiteQuestion:
    assert isinstance(said, m.SiteQuestion)
    return said


def refusal(said: m.Message | None) -> str:
    assert isinstance(said, m.Status)
    assert said.code == m.StatusCode.BAD_REQUEST
    return said.message
