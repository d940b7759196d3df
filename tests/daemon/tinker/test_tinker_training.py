"""The official SDK of Tinker's API against the daemon, what trains in truth, and a cloud."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from support.cloud.train_runs import Runs, cloud_for_runs
from support.daemon.local_trainer import LocalTrainer, random_data, sampled_data
from support.daemon.tinker_process import LossyRelay, TinkerServer
from support.daemon.tinker_server import BASE
from tinker import types

pytestmark = [pytest.mark.server, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]
ADAM = types.AdamParams(learning_rate=1e-2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("cloud")) as started:
        yield started


def start(runs: Runs, folder: Path, *flags: str) -> TinkerServer:
    cloud = {"cloud": runs.server.address, "key": str(runs.server.home.key_file)}
    environment = {"REAL_CLOUD": json.dumps(cloud), "OMP_NUM_THREADS": "1"}  # as the trainer in this process has
    return TinkerServer(folder, *flags, environment=environment)


@pytest.fixture(scope="module")
def server(runs: Runs, tmp_path_factory: pytest.TempPathFactory, warm_module: None) -> Iterator[TinkerServer]:
    made = start(runs, tmp_path_factory.mktemp("tinker"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def client(server: TinkerServer) -> Iterator[tinker.ServiceClient]:
    made = tinker.ServiceClient(base_url=server.url, api_key=server.token())
    yield made
    made.close("success").result()


def _data(given: list[dict[str, Any]]) -> list[types.Datum]:
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(datum["tokens"]),
            loss_fn_inputs={
                "target_tokens" if name == "targets" else name: values
                for name, values in datum.items()
                if name != "tokens"
            },
        )
        for datum in given
    ]


def _logprobs(result: types.ForwardBackwardOutput) -> list[list[float]]:
    return [output["logprobs"].tolist() for output in result.loss_fn_outputs]


@pytest.mark.long
def test_the_sdk_trains_as_what_trains_does(
    runs: Runs, client: tinker.ServiceClient, server: TinkerServer, tmp_path: Path
) -> None:
    """Bit for bit, also after what trains was killed between a gradient and its step."""
    model = client.create_lora_training_client(base_model=BASE, rank=4, seed=3).result()
    with LocalTrainer(runs, tmp_path) as local:
        local.create(unembed=True)  # the SDK's default
        for number in range(1, 4):
            promise = model.forward_backward(_data(random_data(number)), "cross_entropy")
            step = model.optim_step(ADAM)
            expected = local.forward_backward(random_data(number))
            found = promise.result()
            assert found.metrics == pytest.approx(expected["metrics"])
            assert _logprobs(found) == [output["logprobs"] for output in expected["outputs"]]
            assert step.result().metrics == pytest.approx(local.step(number)["metrics"])
        saved = model.save_state("three").result().path

        config = {"clip_high_threshold": 1.5}
        found = model.forward_backward(_data(sampled_data(4)), "ppo", config).result()
        expected = local.forward_backward(sampled_data(4), loss="ppo", loss_config=config)
        assert found.metrics == pytest.approx(expected["metrics"])
        os.kill(server.trainer(), signal.SIGKILL)
        model.optim_step(ADAM).result()
        local.step(4)

        def squares(_data: list[types.Datum], found: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
            return torch.cat(found).square().sum() / 100, {}

        custom = model.forward_backward_custom(_data(random_data(5)), squares).result()
        logprobs = local.forward_backward(random_data(5), forward_only=True)["outputs"]
        weighted = random_data(5)
        for datum, output in zip(weighted, logprobs, strict=True):
            values = torch.tensor(output["logprobs"], requires_grad=True)
            (values.square().sum() / 100).backward()  # type: ignore[no-untyped-call]
            assert values.grad is not None
            datum["weights"] = (-values.grad).tolist()
        local.forward_backward(weighted)
        model.optim_step(ADAM).result()
        local.step(5)
        assert custom.metrics
        last = _logprobs(model.forward(_data(random_data(6)), "cross_entropy").result())
        assert last == [
            output["logprobs"] for output in local.forward_backward(random_data(6), forward_only=True)["outputs"]
        ]

    again = client.create_training_client_from_state_with_optimizer(saved).result()
    again.forward_backward(_data(sampled_data(4)), "ppo", config).result()
    again.optim_step(ADAM).result()
    again.forward_backward_custom(_data(random_data(5)), squares).result()
    again.optim_step(ADAM).result()
    assert _logprobs(again.forward(_data(random_data(6)), "cross_entropy").result()) == last
    fresh = client.create_training_client_from_state(saved).result()  # the control: moments that start anew
    fresh.forward_backward(_data(sampled_data(4)), "ppo", config).result()
    fresh.optim_step(ADAM).result()
    assert _logprobs(fresh.forward(_data(random_data(6)), "cross_entropy").result()) != last


@pytest.mark.long
def test_what_crosses_in_training_is_counted(client: tinker.ServiceClient, server: TinkerServer) -> None:
    model = client.create_lora_training_client(base_model=BASE, rank=4, seed=3).result()
    before = server.crossed()
    data = random_data(1)
    model.forward_backward(_data(data), "cross_entropy").result()
    after = server.crossed()
    positions = sum(len(datum["tokens"]) for datum in data)
    hidden = 4 * 32  # bytes of a position's hidden state, each of which goes up as an activation and as a gradient
    for way in ("bytes_up", "bytes_down"):
        assert after[way] - before[way] > 2 * positions * hidden
    assert after["calls"] > before["calls"]
    model.optim_step(ADAM).result()  # is done on this machine
    assert server.crossed() == after


def test_what_trains_refuses_by_name(client: tinker.ServiceClient) -> None:
    model = client.create_lora_training_client(base_model=BASE, rank=4, seed=3).result()
    for promise, said in [
        (model.forward_backward(_data(sampled_data(1)), "dro"), "dro needs beta"),
        (model.forward_backward(_data(sampled_data(1)), "cross_entropy"), "needs weights"),
        (model.optim_step(ADAM), "no gradients"),
    ]:
        with pytest.raises(tinker.RequestFailedError, match=said):
            promise.result()


@pytest.mark.long
def test_a_daemon_killed_between_gradients_and_their_step_changes_no_bit(
    client: tinker.ServiceClient, server: TinkerServer
) -> None:
    found = []
    for case in ("undisturbed", "killed", "lost"):
        model = client.create_lora_training_client(base_model=BASE, rank=4, seed=3).result()
        for number in (1, 2):
            model.forward_backward(_data(random_data(number)), "cross_entropy").result()
            if case != "lost":  # the control: one gradient fewer
                model.forward_backward(_data(random_data(10 + number)), "cross_entropy").result()
            if case == "killed" and number == 2:
                server.kill()
                server.start()
            model.optim_step(ADAM).result()
        found.append(_logprobs(model.forward(_data(random_data(6)), "cross_entropy").result()))
    assert found[0] == found[1]
    assert found[0] != found[2]


def _adapter(client: tinker.ServiceClient, server: TinkerServer) -> bytes:
    """What a model has learned in two steps, each with the gradients of two requests: the file of its adapter."""
    model = client.create_lora_training_client(base_model=BASE, rank=4, seed=3).result()
    for number in (1, 2):
        promises: list[Any] = [
            model.forward_backward(_data(random_data(data)), "cross_entropy") for data in (number, 10 + number)
        ]
        promises.append(model.optim_step(ADAM))
        for promise in promises:
            promise.result()
    return server.adapter(model.save_state("end").result().path)


def _adapter_over_a_relay(server: TinkerServer, loses: Callable[[str, int], bool]) -> tuple[bytes, list[str]]:
    """The same, where some answers never reach the SDK, which asks again; and which those are."""
    relay = LossyRelay(server.port, loses)
    client = tinker.ServiceClient(base_url=relay.url, api_key=server.token())
    made = _adapter(client, server)
    client.close("success").result()
    relay.close()
    return made, [path.rpartition("/")[2] for path in relay.lost]


@pytest.mark.long
def test_answers_lost_on_the_wire_change_no_bit(
    runs: Runs, client: tinker.ServiceClient, server: TinkerServer, tmp_path: Path
) -> None:
    """The SDK sends a request again whose answer was lost, and its gradient counts once."""
    undisturbed = _adapter(client, server)
    endpoints = ("create_model", "forward_backward", "optim_step", "save_weights", "retrieve_future")
    found, lost = _adapter_over_a_relay(server, lambda path, count: path.endswith(endpoints) and count % 2 == 0)
    assert set(lost) == set(endpoints)
    assert found == undisturbed

    forgetful = start(runs, tmp_path, "--forgetful")  # the control: a server to which each request is a new one
    try:
        found, lost = _adapter_over_a_relay(
            forgetful, lambda path, count: path.endswith("forward_backward") and count == 0
        )
    finally:
        forgetful.kill()
    assert lost == ["forward_backward"]
    assert found != undisturbed
