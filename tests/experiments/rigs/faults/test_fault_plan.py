"""Which faults come when, and which count: a playbook of moments, without any process."""

from __future__ import annotations

import pytest

from isthmus.experiments.rigs.faults.fault_plan import EXHAUSTED, PHASES, TRIGGERS, Fault, FaultPlan, Moment


def at(question: str, phase: str, step: int = 1, retries: int = 0) -> Moment:
    return Moment(question, phase, step, retries, 0)


def test_a_fault_waits_for_its_step_and_its_phase() -> None:
    plan = FaultPlan(["forward_waiting"], 2, steps=10)
    assert plan.choose(at("fetch", "waiting", 0)) is None
    assert plan.choose(at("forward", "waiting", 0)) is None
    assert plan.choose(at("forward", "sending")) is None
    assert plan.choose(at("backward", "waiting")) is None
    assert plan.choose(at("forward", "waiting")) == Fault("forward_waiting", 0)
    assert plan.settle(at("handshake", "sending", retries=1)) is not None
    assert plan.choose(at("forward", "waiting", 4, 1)) is None  # the second one is due in the middle of the run
    assert plan.choose(at("forward", "waiting", 5, 1)) == Fault("forward_waiting", 1)


def test_the_first_fault_of_an_answer_breaks_the_prompt_s_own_call() -> None:
    plan = FaultPlan(["decode_sending"], 2, steps=10)
    assert plan.choose(at("decode", "sending", 0)) is None
    assert plan.choose(at("decode", "sending", 1)) == Fault("decode_sending", 0)
    assert plan.settle(at("handshake", "sending", 1, retries=1)) is True
    assert plan.choose(at("decode", "sending", 1, retries=1)) is None  # it is repeated, and no further step


def test_a_fault_counts_when_the_edge_repeated_something() -> None:
    plan = FaultPlan(["backward_sending"], 1, steps=1)
    plan.choose(at("backward", "sending", retries=4))
    assert plan.settle(at("backward", "waiting", retries=4)) is None
    assert plan.settle(at("handshake", "sending", retries=5)) is True
    assert plan.counted == {"backward_sending": 1}
    assert (plan.left, plan.injected) == (0, 1)


def test_a_fault_that_disturbed_nothing_does_not_count_and_comes_again() -> None:
    plan = FaultPlan(["forward_waiting"], 1, steps=1)
    plan.choose(at("forward", "waiting"))
    assert plan.settle(at("forward", "idle")) is None
    assert plan.settle(at("backward", "sending")) is False
    assert (plan.left, plan.counted.total()) == (1, 0)
    assert plan.choose(at("forward", "waiting", 2)) == Fault("forward_waiting", 0)


def test_no_fault_is_tried_for_ever() -> None:
    plan = FaultPlan(["forward_waiting"], 1, steps=1)
    for _ in range(EXHAUSTED):
        assert plan.choose(at("forward", "waiting")) is not None
        plan.settle(at("backward", "sending"))
    assert plan.choose(at("forward", "waiting")) is None
    assert (plan.left, plan.injected, plan.counted.total()) == (0, EXHAUSTED, 0)


def test_a_killed_edge_counts_when_the_resumed_one_has_repeated_the_call() -> None:
    plan = FaultPlan(["edge_killed", "forward_sending"], 1, steps=10)
    assert plan.choose(at("forward", "waiting", 7, retries=3)) == Fault("edge_killed", 0)
    plan.reborn()
    assert plan.settle(at("forward", "idle", 5)) is None
    assert plan.choose(at("forward", "sending", 6)) is None  # one fault at a time
    assert plan.settle(at("forward", "waiting", 7)) is None
    assert plan.settle(at("backward", "idle", 7)) is None
    assert plan.settle(at("forward", "idle", 7)) is True


def test_a_drained_cloud_answers_the_call_in_flight_and_fails_the_next() -> None:
    plan = FaultPlan(["cloud_restarted"], 1, steps=1)
    plan.choose(at("forward", "waiting"))
    assert plan.settle(at("backward", "sending")) is None
    assert plan.settle(at("handshake", "sending", retries=1)) is True


def test_a_handshake_needs_a_broken_connection_first() -> None:
    plan = FaultPlan(["handshake"], 1, steps=1)
    assert not plan.wants_reconnect(at("forward", "waiting"))
    assert not plan.wants_reconnect(at("attach", "sending"))
    assert plan.wants_reconnect(at("forward", "sending"))
    assert plan.choose(at("forward", "sending")) is None
    assert plan.choose(at("handshake", "sending", retries=1)) == Fault("handshake", 0)
    assert not plan.wants_reconnect(at("forward", "sending"))


def test_an_answer_is_held_back_when_the_next_fault_falls_before_it() -> None:
    plan = FaultPlan(["worker_killed"], 2, steps=4)
    assert not plan.wants_hold(at("forward", "sending", 0))  # not due yet
    assert not plan.wants_hold(at("backward", "sending"))
    assert not plan.wants_hold(at("forward", "waiting"))  # too late
    assert plan.wants_hold(at("forward", "sending"))
    assert plan.choose(at("forward", "waiting")) is not None
    assert not plan.wants_hold(at("forward", "sending", 4))  # one fault at a time
    plan.settle(at("handshake", "sending", 1, retries=1))
    assert not plan.wants_hold(at("forward", "sending", 4, 1))
    assert plan.wants_hold(at("backward", "sending", 4, 1))
    assert not FaultPlan(["forward_sending"], 1, steps=1).wants_hold(at("forward", "sending"))


def test_forward_and_backward_take_turns() -> None:
    plan = FaultPlan(["worker_killed"], 2, steps=1)
    assert plan.choose(at("backward", "waiting")) is None
    assert plan.choose(at("forward", "waiting")) is not None
    plan.settle(at("handshake", "sending", retries=1))
    assert plan.choose(at("forward", "waiting", retries=1)) is None
    assert plan.choose(at("backward", "waiting", retries=1)) is not None


@pytest.mark.parametrize("steps", [1, 40])
def test_every_phase_gets_its_faults_and_evictions_come_after_a_restart(steps: int) -> None:
    plan = FaultPlan(PHASES, 3, steps)
    chosen: list[str] = []
    retries = 0
    while plan.left:
        for phase in PHASES:
            questions, part = TRIGGERS[phase]
            for question in questions:
                fault = plan.choose(at(question, part, steps, retries))
                if fault is None:
                    continue
                chosen.append(fault.phase)
                if fault.phase == "edge_killed":
                    plan.reborn()
                    retries = 0
                    assert plan.settle(at(question, "idle", steps, retries)) is not None
                else:
                    retries += 1
                    assert plan.settle(at("handshake", "sending", steps, retries)) is not None
    assert plan.counted == dict.fromkeys(PHASES, 3)
    assert plan.wanted == len(chosen) == 3 * len(PHASES)
    assert chosen.index("cloud_restarted") < chosen.index("stash_evicted")
