"""NaN and infinity from the cloud: each tensor that comes in is refused once, by name, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from support.cloud.memory_cloud import MemoryCloud, messages, new_link
from support.models.tiny import VOCAB
from support.protocol.wire import unchecked
from torch import Tensor

from isthmus.backbone.plan import Span
from isthmus.backbone.sites.ladder import add_ladder
from isthmus.common.errors import NonFiniteError, ReceivedNonFiniteError
from isthmus.edge.client.link import Link
from isthmus.protocol import messages as m
from isthmus.protocol.tensor_codecs import Payload, decode

pytestmark = pytest.mark.usefixtures("cache_folder")


def at_the_edge(link: Link) -> Any:
    return adapted(link.load_model(), layers_to_transform=[0, 1])


def inside(link: Link) -> Any:
    return adapted(link.load_model())


def leased(link: Link) -> Any:
    return adapted(link.load_model(leased=lambda name: True))


def with_taps(link: Link) -> Any:
    torch.manual_seed(3)
    model = link.load_model()
    add_ladder(model, [2, 3], span=Span(2, 4), reduction=2, tap_width=8, seed=3)
    return model


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False, **options
    )
    return peft.get_peft_model(model, config)


def step(model: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss and the gradients of a loop of a user's own, which looks at neither."""
    ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def bad(payload: Payload, value: float) -> Payload:
    tensor = decode(payload).clone()
    tensor.view(-1)[-1] = value
    return unchecked(tensor, "fp32", payload.role)


def in_last(payloads: tuple[Payload, ...], value: float) -> tuple[Payload, ...]:
    return (*payloads[:-1], bad(payloads[-1], value))


PHASES = m.SitePhase
CASES: dict[str, tuple[Callable[[Link], Any], Callable[[Any, float], m.Message | None], str]] = {
    "output": (
        at_the_edge,
        lambda a, v: replace(a, hidden=bad(a.hidden, v)) if isinstance(a, m.ForwardReply) else None,
        "the output of the cloud's layers",
    ),
    "gradient": (
        at_the_edge,
        lambda a, v: replace(a, gradient=bad(a.gradient, v)) if isinstance(a, m.BackwardReply) else None,
        "the gradient from the cloud's layers",
    ),
    "tap": (
        with_taps,
        lambda a, v: replace(a, taps=in_last(a.taps, v)) if isinstance(a, m.ForwardReply) else None,
        "the output of tap 1",
    ),
    "leased": (
        leased,
        lambda a, v: replace(a, leased=in_last(a.leased, v)) if isinstance(a, m.BackwardReply) else None,
        "the gradient of a leased matrix",
    ),
    "site's input": (
        inside,
        lambda a, v: (
            replace(a, tensors=in_last(a.tensors, v))
            if isinstance(a, m.SiteQuestion) and a.phase == PHASES.FORWARD
            else None
        ),
        "the input of sites 2.self_attn.q_proj, 2.self_attn.v_proj",
    ),
    "site's gradient": (
        inside,
        lambda a, v: (
            replace(a, tensors=in_last(a.tensors, v))
            if isinstance(a, m.SiteQuestion) and a.phase == PHASES.BACKWARD
            else None
        ),
        "the gradient of sites 3.self_attn.q_proj, 3.self_attn.v_proj",
    ),
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("case", CASES)
def test_a_tensor_from_the_cloud_is_refused_once_and_by_name(cloud: MemoryCloud, case: str, value: float) -> None:
    make, change, name = CASES[case]
    loss, gradients = step(make(new_link(cloud)))  # the control: without the change it passes
    link = new_link(cloud)
    model = make(link)
    cloud.spoil = lambda answer: change(answer, value) or answer
    cloud.seen.clear()
    with pytest.raises(ReceivedNonFiniteError, match=rf"^{name} of shape .* came with NaN or infinite values.*Use "):
        step(model)
    assert len(messages(cloud, m.Forward)) == 1  # nothing is asked again: the numbers would be the same
    assert len(messages(cloud, m.Backward)) <= 1
    assert link.traffic.retries == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    cloud.spoil = lambda answer: answer
    model.zero_grad()
    again, found = step(model)  # and the link goes on
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients, strict=True))


def test_what_the_cloud_itself_finds_is_told_and_not_asked_again(cloud: MemoryCloud) -> None:
    """Finite numbers that overflow inside the cloud's layers, by a codec that could carry what comes of them."""
    link = new_link(cloud)
    hidden = torch.randn(2, 6, link.info.hidden_size)
    _, kept = link.forward_span(hidden, None, None, keep=True)
    with pytest.raises(NonFiniteError, match="fp32 cannot carry the gradient from the cloud's layers") as caught:
        link.backward_span(kept, torch.full_like(hidden, 3e38), hidden, None, None)
    assert caught.value.exit_code == 50
    assert len(messages(cloud, m.Backward)) == 1
