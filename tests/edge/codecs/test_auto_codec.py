"""The choice of codecs as a run goes on: what it sets, when, and that it leaves no other trace."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from isthmus.common.errors import NonFiniteError
from isthmus.edge.codecs.auto_codec import AutoCodec
from isthmus.edge.codecs.wire_codecs import DIRECTIONS, WireCodecs
from isthmus.protocol.tensor_codecs import ACTIVATION_CODECS

FP32 = WireCodecs()
INT8 = WireCodecs.parse("int8")
# How far a direction's codec turns the gradient, in radians.
ERRORS = {"fp32": 0.0, "fp16": 1e-4, "bf16": 1e-3, "int8": 1e-2, "int4-outliers": 0.2, "int4": 0.4}


class Coded:
    """A link, as far as this goes."""

    def __init__(self) -> None:
        self.codecs = FP32


class Model:
    """A loss whose gradient is turned by the codecs of a link, and which draws a random number."""

    def __init__(self, link: Coded) -> None:
        self._link = link
        self.weight = nn.Parameter(torch.zeros(3))
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.unused = nn.Parameter(torch.zeros(2))
        self.tried: list[WireCodecs] = []
        self.drawn: list[float] = []
        self.fail_at = 0
        self.error: Exception = NonFiniteError("NaN.")

    def loss(self, batch: Any) -> Tensor:
        assert batch == {"probe": 1}
        self.tried.append(self._link.codecs)
        self.drawn.append(float(torch.rand(())))
        if len(self.tried) == self.fail_at:
            raise self.error
        angles = [torch.tensor(ERRORS[getattr(self._link.codecs, key)]) for key in DIRECTIONS]
        turned = torch.stack([torch.ones(()), sum(angles, torch.zeros(())), torch.zeros(())])
        return (self.weight * turned).sum()


class Run:
    """The observer with everything around it."""

    def __init__(self, target: float = 0.999, every: int = 3) -> None:
        self.links = [Coded(), Coded()]
        self.model = Model(self.links[0])
        self.said: list[str] = []
        trained = [self.model.weight, self.model.unused, self.model.frozen]
        self.auto = AutoCodec(
            self.links,
            ACTIVATION_CODECS,
            576,
            target,
            every,
            trained=trained,
            loss=self.model.loss,
            probe={"probe": 1},  # type: ignore[dict-item]  # the loss knows it
            say=self.said.append,
        )


def test_the_choice_is_set_on_every_link_and_told() -> None:
    run = Run()
    run.auto.before_step(1)
    chosen = run.links[0].codecs
    assert chosen == INT8
    assert run.links[1].codecs == chosen
    assert run.said == [
        f"codecs from step 1 on: int8, {chosen.bytes_per_token(576)} bytes per token, gradient cosine 0.9992 "
        "(at least 0.999)"
    ]
    assert run.auto.points() == {
        "codecs/bytes_per_token": chosen.bytes_per_token(576),
        "codecs/cosine": pytest.approx(0.9992),
    }


def test_every_trial_has_the_random_state_that_the_step_will_have() -> None:
    run = Run()
    before = torch.get_rng_state()
    run.auto.before_step(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(run.model.drawn)) == 1
    assert len(run.model.tried) > 3


def test_it_chooses_again_when_it_is_time() -> None:
    run = Run(every=3)
    trials = []
    for step in range(1, 9):
        before = len(run.model.tried)
        run.auto.before_step(step)
        run.auto.after_step(step)
        trials.append(len(run.model.tried) > before)
    assert trials == [True, False, False] * 2 + [True, False]


def test_what_a_rule_freezes_later_is_left_out() -> None:
    run = Run()
    run.model.unused.requires_grad_(False)
    run.auto.before_step(1)
    assert run.links[0].codecs == INT8


@pytest.mark.parametrize("error", [NonFiniteError("NaN."), KeyboardInterrupt()])
def test_a_choice_that_fails_leaves_everything_as_it_was(error: Exception) -> None:
    run = Run(every=3)
    run.auto.before_step(1)
    run.model.fail_at, run.model.error = len(run.model.tried) + 1, error  # the gradients with fp32
    before = torch.get_rng_state()
    with pytest.raises(type(error)):
        run.auto.before_step(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert [link.codecs for link in run.links] == [INT8, INT8]
    run.auto.before_step(4)  # and it is still time
    assert len(run.said) == 2


def test_its_state_goes_through_json_and_sets_the_links() -> None:
    run = Run(every=3)
    run.auto.before_step(1)
    again = Run(every=3)
    again.auto.load_state(json.loads(json.dumps(run.auto.state())))
    assert [link.codecs for link in again.links] == [INT8, INT8]
    assert again.auto.points() == run.auto.points()
    for step in (2, 3):
        again.auto.before_step(step)
    assert not again.model.tried
    again.auto.before_step(4)
    assert again.model.tried


def test_before_the_first_choice_its_state_says_so() -> None:
    again = Run()
    again.auto.load_state(json.loads(json.dumps(Run().auto.state())))
    again.auto.before_step(1)
    assert again.links[0].codecs == INT8
