"""Gradients are neither lost nor counted twice: lost answers, a killed daemon, a killed process that trains."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tinker
from support.daemon.fake_trainer import AWAY, KILLS, gradient
from support.daemon.tinker_process import LossyRelay, TinkerServer
from support.daemon.tinker_server import BASE
from tinker import types

pytestmark = [
    pytest.mark.server,
    pytest.mark.usefixtures("warm_module"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

RATE = 0.5
START = 1.25  # a new model's number with seed 250
TOKENS = ([3, 4], [5, 6, 7], [8])
ADAM = types.AdamParams(learning_rate=RATE)

Start = Callable[..., TinkerServer]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers, which end with the test."""
    made: list[TinkerServer] = []

    def begin(*flags: str, **environment: str) -> TinkerServer:
        made.append(TinkerServer(tmp_path, *flags, environment=environment))
        return made[-1]

    yield begin
    for server in made:
        server.kill()


def client_of(server: TinkerServer, url: str | None = None) -> tinker.ServiceClient:
    return tinker.ServiceClient(base_url=url or server.url, api_key=server.token())


def model_of(client: tinker.ServiceClient) -> tinker.TrainingClient:
    made: tinker.TrainingClient = client.create_lora_training_client(base_model=BASE, rank=8, seed=250).result()
    return made


def datum(*tokens: int) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs={"target_tokens": list(tokens)}
    )


def after(*steps: tuple[list[int], ...], times: int = 1) -> float:
    """A model's number after steps with the gradients of such data."""
    weight, moment = START, 0.0
    for data in steps:
        moment = 0.5 * moment + times * sum(gradient(tokens, [1.0] * len(tokens)) for tokens in data)
        weight -= RATE * moment
    return weight


def _train_over_a_relay(server: TinkerServer, *endpoints: str) -> tuple[float, list[str]]:
    """Train a step over a relay that loses every second answer of some endpoints."""
    relay = LossyRelay(server.port, lambda path, count: path.endswith(endpoints) and count % 2 == 0)
    client = client_of(server, relay.url)
    model = model_of(client)
    losses = [model.forward_backward([datum(*tokens)], "cross_entropy") for tokens in TOKENS]
    step = model.optim_step(ADAM)
    for promise in (*losses, step):
        promise.result()
    weight = server.state(model.model_id)["weight"]
    client.close("success").result()
    relay.close()
    return weight, relay.lost


def test_answers_lost_on_the_wire_never_count_a_gradient_twice(start: Start) -> None:
    server = start()
    weight, lost = _train_over_a_relay(server, "create_model", "forward_backward", "optim_step")
    assert len(lost) >= 4
    assert weight == pytest.approx(after(TOKENS))
    assert server.questions("forward_backward") == len(TOKENS)
    assert server.questions("optim_step") == 1


def test_a_server_that_forgets_promises_counts_them_twice(start: Start) -> None:
    server = start("--forgetful")
    weight, lost = _train_over_a_relay(server, "forward_backward")
    assert lost
    assert weight != pytest.approx(after(TOKENS))
    assert server.questions("forward_backward") > len(TOKENS)


def test_a_killed_daemon_loses_no_gradient_and_repeats_no_answer(start: Start) -> None:
    server = start()
    client = client_of(server)
    model = model_of(client)
    model.forward_backward([datum(*TOKENS[0])], "cross_entropy").result()
    model.optim_step(ADAM).result()
    first = model.forward_backward([datum(*TOKENS[1])], "cross_entropy")
    told = first.result()
    server.kill()
    server.start()
    assert server.questions("forward_backward") == 2  # nothing is done again before somebody asks for it
    second = model.forward_backward([datum(*TOKENS[2])], "cross_entropy")
    step = model.optim_step(ADAM)
    second.result()
    step.result()
    assert server.questions("forward_backward") == 4  # the one that was answered, once more
    assert server.state(model.model_id)["weight"] == pytest.approx(after(TOKENS[:1], TOKENS[1:]))
    # What was told is still there, and the same.
    again = tinker.lib.api_future_impl._APIFuture(
        types.ForwardBackwardOutput, client.holder, _untyped(server, model.model_id, 3), 0.0, "ForwardBackward"
    ).result()
    assert again.metrics == told.metrics
    client.close("success").result()


def test_a_daemon_killed_while_promises_wait_does_them_in_order(start: Start) -> None:
    server = start()
    client = client_of(server)
    model = model_of(client)
    waiting = [model.forward_backward([datum(AWAY)], "cross_entropy")]
    waiting += [model.forward_backward([datum(*tokens)], "cross_entropy") for tokens in TOKENS]
    step = model.optim_step(ADAM)
    saved = model.save_state("end")
    while _count(server, model.model_id) < 6:
        pass
    server.kill()
    (server.folder / "cloud-is-back").touch()
    server.start()
    for promise in (*waiting, step):
        promise.result()
    assert saved.result().path == f"tinker://{model.model_id}/weights/end"
    assert server.state(model.model_id)["weight"] == pytest.approx(after(([AWAY], *TOKENS)))
    client.close("success").result()


def test_a_step_that_was_saved_and_not_answered_is_not_done_again(start: Start, tmp_path: Path) -> None:
    server = start(FAKE_TRAINER_DIES_AFTER_STEP=str(tmp_path / "died"))
    client = client_of(server)
    model = model_of(client)
    model.forward_backward([datum(*TOKENS[0])], "cross_entropy").result()
    model.optim_step(ADAM).result()
    assert (tmp_path / "died").exists()
    assert server.questions("optim_step") == 2  # asked again, and not done again
    assert server.state(model.model_id)["weight"] == pytest.approx(after(TOKENS[:1]))
    client.close("success").result()


def test_a_process_that_dies_is_made_good_and_what_kills_it_is_refused(start: Start) -> None:
    server = start()
    client = client_of(server)
    one, two = model_of(client), model_of(client)
    for model in (one, two):
        model.forward_backward([datum(*TOKENS[0])], "cross_entropy").result()
    step = one.optim_step(ADAM)
    saved = one.save_state("first").result().path
    step.result()
    three = client.create_training_client_from_state(saved).result()
    three.forward_backward([datum(*TOKENS[2])], "cross_entropy").result()
    tinker.RestClient(base_url=server.url, api_key=server.token()).delete_checkpoint_from_tinker_path(saved).result()
    os.kill(server.trainer(), signal.SIGKILL)
    one.forward_backward([datum(*TOKENS[1])], "cross_entropy").result()
    with pytest.raises(tinker.RequestFailedError, match="has died 3 times at it") as error:
        one.forward_backward([datum(KILLS)], "cross_entropy").result()
    assert error.value.category is types.RequestErrorCategory.Server
    first = after(TOKENS[:1])
    for model, weight in (
        (one, after(TOKENS[:1], TOKENS[1:2])),
        (two, first),
        (three, first - RATE * gradient(TOKENS[2], [1.0])),  # its optimizer began anew
    ):
        model.optim_step(ADAM).result()
        assert server.state(model.model_id)["weight"] == pytest.approx(weight)
    client.close("success").result()


def _untyped(server: TinkerServer, model: str, seq: int) -> types.UntypedAPIFuture:
    """A promise as its client first was told of it."""
    with _rows(server) as rows:
        (found,) = rows.execute(
            "SELECT id FROM tinker_promises WHERE scope = ? AND key = ?", (f"model/{model}", str(seq))
        ).fetchone()
    return types.UntypedAPIFuture(request_id=found)


def _count(server: TinkerServer, model: str) -> int:
    with _rows(server) as rows:
        (count,) = rows.execute("SELECT count(*) FROM tinker_promises WHERE scope = ?", (f"model/{model}",)).fetchone()
    return int(count)


def _rows(server: TinkerServer) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(server.home / "state.db"))
