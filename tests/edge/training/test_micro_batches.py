"""InFlight: who computes when, what a micro-batch's random numbers are, and how a step on several links ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from isthmus.backbone.sites.edge_sites import Site
from isthmus.backbone.sites.site_spec import SiteSpec
from isthmus.common.errors import NonFiniteError, UnreachableError
from isthmus.edge.client.remote_span import BackwardRequest, ForwardRequest, RemoteSpan
from isthmus.edge.run_report import WireTotals
from isthmus.edge.training.micro_batches import InFlight, SummedMeter

LONG = 60.0  # seconds after which a test has hung


@dataclass
class Doubler:
    """A link to a cloud that doubles, and does in between what the test wants."""

    between: Callable[[Tensor], None] = lambda tensor: None
    calls: list[str] = field(default_factory=list)
    kept: list[bool] = field(default_factory=list)

    def forward(self, request: ForwardRequest) -> tuple[Tensor, str]:
        hidden, sites = request.inputs.hidden, request.sites
        self.calls.append("forward")
        self.kept.append(request.keep)
        self.between(hidden)
        output = 2 * hidden
        if sites is not None:
            output = output + sites.forward([0], [hidden])[0]
        return output, "handle"

    def backward(self, request: BackwardRequest) -> Tensor:
        gradient, sites = request.gradient, request.sites
        assert request.kept == "handle"
        self.calls.append("backward")
        self.between(gradient)
        result = 2 * gradient
        if sites is not None:
            (more,) = sites.backward([0], [gradient], wanted=True)
            assert more is not None
            result = result + more
        return result


class Alone:
    """Fails if two threads are inside at a time."""

    def __init__(self) -> None:
        self._free = threading.Lock()

    def __enter__(self) -> None:
        assert self._free.acquire(blocking=False), "two micro-batches compute at a time"

    def __exit__(self, *_: object) -> None:
        self._free.release()


def forward(in_flight: InFlight, value: float = 1.0) -> Tensor:
    return RemoteSpan(in_flight)(torch.full((1, 1, 4), float(value), requires_grad=True), None, None)


# Who computes ---------------------------------------------------------------------------------------------------------


def test_two_are_on_their_way_and_one_computes() -> None:
    both = threading.Barrier(2)  # which nobody passes alone
    in_flight = InFlight([Doubler(lambda _: void(both.wait(LONG))) for _ in range(2)])
    alone = Alone()

    def work(item: float) -> float:
        with alone:
            hidden = torch.full((1, 1, 4), item, requires_grad=True)
        output = RemoteSpan(in_flight)(hidden, None, None)
        with alone:
            loss = output.sum()
        (gradient,) = torch.autograd.grad(loss, hidden)
        with alone:
            return (loss + gradient.sum()).item()

    assert list(in_flight.map(work, [1.0, 2.0, 3.0, 4.0])) == [16.0, 24.0, 32.0, 40.0]


def test_what_sites_compute_is_computed_alone() -> None:
    alone, both = Alone(), threading.Barrier(2)

    class Adapter(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with alone:
                return super().forward(x)

    site = Site("model.layers.2.q_proj", SiteSpec(2, "q_proj"), Adapter(4, 4))
    in_flight = InFlight([Doubler(lambda _: void(both.wait(LONG))) for _ in range(2)])

    def work(item: float) -> list[Tensor]:
        hidden = torch.full((1, 1, 4), item, requires_grad=True)
        output = RemoteSpan(in_flight).at_sites(hidden, None, None, [site])
        with alone:
            loss = output.square().sum()
        return list(torch.autograd.grad(loss, [hidden, *site.parameters]))

    results = list(in_flight.map(work, [1.0, 2.0, 3.0, 4.0]))
    for item, found in zip([1.0, 2.0, 3.0, 4.0], results, strict=True):
        hidden = torch.full((1, 1, 4), item, requires_grad=True)
        expected = torch.autograd.grad((2 * hidden + site.module(hidden)).square().sum(), [hidden, *site.parameters])
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


def test_results_come_in_the_order_of_the_items() -> None:
    later = threading.Event()
    in_flight = InFlight([Doubler(lambda _: void(later.wait(LONG))) for _ in range(2)])

    def work(item: int) -> int:
        if item == 0:
            forward(in_flight)
        else:
            later.set()
        return item

    assert list(in_flight.map(work, [0, 1, 2])) == [0, 1, 2]


def test_more_in_flight_than_items_and_none_at_all() -> None:
    in_flight = InFlight([Doubler() for _ in range(3)])
    assert list(in_flight.map(lambda item: item + 1, [1])) == [2]
    assert list(in_flight.map(lambda item: item, [])) == []


# Random numbers and a thread's settings -------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_random_numbers_of_a_micro_batch_are_its_own(n: int) -> None:
    class Dropping(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(torch.nn.functional.dropout(x, 0.5))

    site = Site("q_proj", SiteSpec(2, "q_proj"), Dropping(4, 4, bias=False))

    def draws(in_flight: InFlight) -> list[Tensor]:
        def work(item: float) -> Tensor:
            before = torch.rand(3)
            hidden = torch.full((1, 2, 4), item, requires_grad=True)
            output = RemoteSpan(in_flight).at_sites(hidden, None, None, [site])
            between = torch.rand(3)
            (gradient,) = torch.autograd.grad(output.sum(), hidden)
            return torch.cat([before, between, torch.rand(3), output.detach().flatten(), gradient.flatten()])

        return list(in_flight.map(work, [1.0, 2.0, 3.0, 4.0]))

    torch.manual_seed(3)
    one = draws(InFlight([Doubler()]))
    after = torch.get_rng_state()
    torch.manual_seed(3)
    several = draws(InFlight([Doubler() for _ in range(n)]))
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))
    again = draws(InFlight([Doubler() for _ in range(n)]))  # the next step draws others
    assert not any(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0][:3], one[1][:3])
    for drawn in one:  # nor does it draw the same again
        assert len(set(drawn[:9].tolist())) == 9


def test_a_step_costs_the_random_state_the_same_whatever_is_drawn() -> None:
    states = []
    for work in (lambda item: item, lambda item: torch.rand(100 + item)):
        torch.manual_seed(3)
        list(InFlight([Doubler(), Doubler()]).map(work, [0, 1, 2]))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_forwards_alone_leave_nothing_with_the_cloud() -> None:
    links = [Doubler(), Doubler()]
    in_flight = InFlight(links)
    with torch.no_grad():
        assert not any(
            output.requires_grad for output in in_flight.map(lambda item: forward(in_flight, item), [1.0, 2.0])
        )
    list(in_flight.map(lambda item: forward(in_flight, item), [1.0, 2.0]))
    assert sorted(keep for link in links for keep in link.kept) == [False, False, True, True]


def test_every_thread_computes_with_as_many_torch_threads_as_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking a new thread would hide it: torch then looks the number up, which a matrix product does not."""
    set_by: dict[str, int] = {}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: set_by.update({threading.current_thread().name: n}))
    both = threading.Barrier(2)
    in_flight = InFlight([Doubler(lambda _: void(both.wait(LONG))) for _ in range(2)])
    names = list(in_flight.map(lambda item: (forward(in_flight, item), threading.current_thread().name)[1], [0, 1]))
    assert set_by == dict.fromkeys(names, 3)
    assert len(set_by) == 2


# Links ----------------------------------------------------------------------------------------------------------------


def test_a_call_outside_a_step_goes_over_the_first_link() -> None:
    links = [Doubler(), Doubler()]
    forward(InFlight(links)).sum().backward()  # type: ignore[no-untyped-call]  # torch
    assert [link.calls for link in links] == [["forward", "backward"], []]


def test_a_backward_goes_over_the_link_of_its_forward() -> None:
    both = threading.Barrier(2)
    links = [Doubler(lambda _: void(both.wait(LONG))) for _ in range(2)]
    in_flight = InFlight(links)

    def work(item: float) -> None:
        hidden = torch.full((1, 1, 4), item, requires_grad=True)
        torch.autograd.grad(RemoteSpan(in_flight)(hidden, None, None).sum(), hidden)

    list(in_flight.map(work, [1.0, 2.0]))
    assert [link.calls for link in links] == [["forward", "backward"]] * 2


def test_meters_are_added_up() -> None:
    class Meter:
        def __init__(self, calls: int) -> None:
            self.steps: list[int] = []
            self._calls = calls

        def begin_step(self, step: int) -> None:
            self.steps.append(step)

        def totals(self) -> WireTotals:
            return WireTotals(bytes_up=10 * self._calls, calls=self._calls, wire_s=0.5)

    meters = [Meter(1), Meter(2)]
    meter = SummedMeter(meters)
    meter.begin_step(7)
    assert [each.steps for each in meters] == [[7], [7]]
    assert meter.totals() == WireTotals(bytes_up=30, calls=3, wire_s=1.0)


# Failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["computing", "link"])
def test_a_failure_is_raised_and_nothing_more_begins(where: str) -> None:
    failed, begun = threading.Event(), []

    def wait_or_fail(hidden: Tensor) -> None:
        if hidden.sum() == 0:
            assert failed.wait(LONG)  # item 0 is on its way until item 1 has failed
        elif where == "link":
            raise UnreachableError("away.")

    in_flight = InFlight([Doubler(wait_or_fail), Doubler(wait_or_fail)])

    def work(item: int) -> int:
        begun.append(item)
        try:
            if item == 1 and where == "computing":
                raise UnreachableError("away.")
            forward(in_flight, item)
        except UnreachableError:
            failed.set()
            raise
        return item

    torch.manual_seed(3)
    torch.randint(0, 2**62, (6,))
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    results = in_flight.map(work, list(range(6)))
    assert next(results) == 0
    with pytest.raises(UnreachableError, match="away"):
        next(results)
    assert set(begun[:2]) == {0, 1}
    assert len(begun) <= 3  # the thread of item 0 may have begun another before the failure was known
    assert torch.equal(torch.get_rng_state(), expected)
    assert list(in_flight.map(lambda item: item, [1, 2, 3])) == [1, 2, 3]  # the turn is free


def test_a_micro_batch_that_fails_in_its_turn_gives_it_back_to_one_that_has_left_it() -> None:
    taken = threading.Event()
    in_flight = InFlight([Doubler(lambda _: void(taken.wait(LONG))) for _ in range(2)])

    def work(item: int) -> int:
        if item == 0:
            forward(in_flight)
            return item
        taken.set()
        raise NonFiniteError("NaN.")

    with closing(in_flight.map(work, [0, 1])) as results:
        assert next(results) == 0
        with pytest.raises(NonFiniteError):
            next(results)


def test_a_site_that_fails_ends_the_call_and_frees_the_turn() -> None:
    class Broken(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise NonFiniteError("NaN.")

    in_flight = InFlight([Doubler(), Doubler()])
    site = Site("q_proj", SiteSpec(2, "q_proj"), Broken(4, 4))

    def work(_item: int) -> None:
        RemoteSpan(in_flight).at_sites(torch.ones(1, 1, 4), None, None, [site])

    with pytest.raises(NonFiniteError):
        list(in_flight.map(work, [0, 1, 2]))
    assert list(in_flight.map(lambda item: item, [1, 2, 3])) == [1, 2, 3]


def test_a_caller_that_goes_away_stops_all_threads() -> None:
    begun: list[int] = []
    in_flight = InFlight([Doubler(), Doubler()])

    def work(item: int) -> int:
        begun.append(item)
        forward(in_flight)
        return item

    torch.manual_seed(3)
    torch.randint(0, 2**62, (1000,))
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    with closing(in_flight.map(work, list(range(1000)))) as results:
        next(results)
    assert len(begun) < 1000
    assert torch.equal(torch.get_rng_state(), expected)


# Whole runs -----------------------------------------------------------------------------------------------------------


def void(_: object) -> None:
    """Nothing."""
