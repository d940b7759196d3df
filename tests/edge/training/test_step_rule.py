"""The loss of a step over its micro-batches: its weights, and its gradient, also with several in flight."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.common.errors import NonFiniteError
from isthmus.common.shutdown import Interrupted
from isthmus.edge.data.batches import Batch
from isthmus.edge.training.micro_batches import InFlight
from isthmus.edge.training.step_rule import BatchLoss


class Model(nn.Module):
    """A loss for whose gradients autograd hands out one tensor twice, an expanded one, and a transposed one."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.other = nn.Parameter(torch.tensor([4.0, 5.0, 6.0]))
        self.summed = nn.Parameter(torch.tensor([0.5, 0.25]))
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3))
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, *, labels: Tensor, input_ids: Tensor, use_cache: bool) -> Any:
        assert not use_cache
        x = input_ids.float().mean()
        both = (self.one + self.other) * x
        loss = both.square().sum() + self.summed.sum() * x + (self.turned.t().contiguous() * both[:, None]).sum()
        return SimpleNamespace(loss=loss)


def batch(value: int, labels: int) -> Batch:
    ids = torch.full((1, 4), value)
    return {"input_ids": ids, "labels": torch.tensor([[-100] + [1] * labels + [-100] * (3 - labels)])}


BATCHES = [batch(1, 3), batch(2, 1), batch(3, 2)]


def gradients(in_flight: InFlight | None) -> tuple[float, dict[str, Tensor | None], Model]:
    model = Model()
    trained = list(model.parameters())
    total = BatchLoss(model, "fp32", lambda: None, in_flight).over(1, BATCHES, trained)
    return total, {name: parameter.grad for name, parameter in model.named_parameters()}, model


def two_in_flight() -> InFlight:
    return InFlight([None, None])  # type: ignore[list-item]  # nothing crosses


def test_the_loss_is_the_mean_over_all_labels() -> None:
    total, found, model = gradients(None)
    shares = zip((1 / 2, 1 / 6, 1 / 3), BATCHES, strict=True)
    loss = torch.stack([share * model(**each, use_cache=False).loss for share, each in shares]).sum()
    assert total == pytest.approx(loss.item())
    trained = dict(model.named_parameters())
    expected = torch.autograd.grad(loss, [p for name, p in trained.items() if name != "unused"])
    for name, gradient in zip([name for name in trained if name != "unused"], expected, strict=True):
        torch.testing.assert_close(found[name], gradient)
    assert found["unused"] is None


def test_micro_batches_add_up_what_backward_adds_up_and_every_parameter_has_its_own() -> None:
    total, theirs, _ = gradients(None)
    also, ours, model = gradients(two_in_flight())
    assert also == total
    assert ours.keys() == theirs.keys()
    places = set()
    for name, parameter in model.named_parameters():
        mine, other = ours[name], theirs[name]
        if name == "unused":
            assert mine is other is None
            continue
        assert mine is not None
        assert other is not None
        assert torch.equal(mine, other)
        assert mine.stride() == parameter.stride()
        places.add(mine.untyped_storage().data_ptr())
    assert len(places) == 4


@pytest.mark.parametrize("overlapped", [False, True])
def test_going_forward_alone_leaves_no_gradient(overlapped: bool) -> None:
    model = Model()
    loss = BatchLoss(model, "fp32", lambda: None, two_in_flight() if overlapped else None)
    expected = gradients(None)[0]
    with torch.no_grad():
        assert loss.over(1, BATCHES) == expected
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_loss_that_is_not_finite_names_the_step(overlapped: bool) -> None:
    model = Model()
    with torch.no_grad():
        model.one[0] = torch.nan
    loss = BatchLoss(model, "fp32", lambda: None, two_in_flight() if overlapped else None)
    with pytest.raises(NonFiniteError, match="the loss of step 7 is nan: lower --learning-rate"):
        loss.over(7, BATCHES, list(model.parameters()))


@pytest.mark.parametrize("overlapped", [False, True])
def test_a_request_to_stop_ends_the_step_after_a_micro_batch(overlapped: bool) -> None:
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        raise Interrupted

    model = Model()
    loss = BatchLoss(model, "fp32", check, two_in_flight() if overlapped else None)
    with pytest.raises(Interrupted):
        loss.over(1, BATCHES, list(model.parameters()))
    assert 1 <= len(asked) <= 2
