"""What no SDK sends: every bad request is refused by name, with a 4xx that no client repeats, and nothing breaks."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import zstandard
from support.daemon.tinker_process import TinkerServer
from support.daemon.tinker_server import BASE

from isthmus.daemon.tinker import tinker_wire_pb2 as wire
from isthmus.daemon.tinker.sampling_queue import MOST_SAMPLES
from isthmus.daemon.tinker.wire_bodies import PROTOBUF

pytestmark = pytest.mark.server

MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, warm_module: None) -> Iterator[TinkerServer]:
    made = TinkerServer(tmp_path_factory.mktemp("tinker"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def http(server: TinkerServer) -> Iterator[httpx.Client]:
    headers = {"X-API-Key": server.token()}
    with httpx.Client(base_url=f"{server.url}/api/v1", headers=headers, trust_env=False, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def session(http: httpx.Client) -> str:
    found: str = http.post("/create_session", json={"tags": [], "user_metadata": {}, "sdk_version": "0"}).json()[
        "session_id"
    ]
    return found


@pytest.fixture(scope="module")
def model(http: httpx.Client, session: str) -> str:
    body = {"session_id": session, "model_seq_id": 0, "base_model": BASE, "lora_config": {"rank": 8}}
    return str(result(http, http.post("/create_model", json=body))["model_id"])


@pytest.fixture(scope="module")
def sampler(http: httpx.Client, session: str) -> str:
    body = {"session_id": session, "sampling_session_seq_id": 0, "base_model": BASE}
    return str(http.post("/create_sampling_session", json=body).json()["sampling_session_id"])


def result(http: httpx.Client, promise: httpx.Response) -> dict[str, Any]:
    assert promise.status_code == 200, promise.text
    told = http.post("/retrieve_future", json={"request_id": promise.json()["request_id"]})
    assert told.status_code == 200, told.text
    found: dict[str, Any] = told.json() if told.headers["content-type"] == "application/json" else {}
    return found


def refused(answer: httpx.Response) -> str:
    assert 400 <= answer.status_code < 500, answer.text
    assert answer.status_code not in {408, 409, 429}
    return str(answer.json()["error"]["message"])


def test_a_sampler_samples_from_what_it_was_made_for(http: httpx.Client, sampler: str) -> None:
    body = {
        "sampling_session_id": sampler,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "sampling_params": {"max_tokens": 1},
    }
    for number, (name, value) in enumerate({"base_model": "org/other", "model_path": "tinker://m/weights/x"}.items()):
        message = refused(http.post("/asample", json={**body, "seq_id": 900 + number, name: value}))
        assert f"{name} = {value!r}: the sampler has" in message
    assert http.post("/asample", json={**body, "seq_id": 910, "base_model": BASE}).status_code == 200
    assert http.post("/asample", json={**body, "seq_id": 911, "model_path": None}).status_code == 200


def test_a_project_is_refused_by_name(http: httpx.Client) -> None:
    assert "project_id = 'p': there are no" in refused(http.post("/create_session", json={"project_id": "p"}))
    assert http.post("/create_session", json={"project_id": None}).status_code == 200


@pytest.mark.parametrize("path", ["weights_info", "create_model", "optim_step", "asample", "retrieve_future"])
@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff", b'{"a": 1}', b'{"session_id": "\\ud800"}', b"[" * 100_000, b'{"type": NaN}'],
)
def test_a_body_that_is_not_its_json_is_refused(http: httpx.Client, path: str, body: bytes) -> None:
    assert refused(http.post(f"/{path}", content=body))


def test_bodies_are_bounded(http: httpx.Client, model: str) -> None:
    assert "bytes" in refused(http.post("/create_session", content=b" " * (300 << 10)))
    headers = {"Content-Type": PROTOBUF}
    assert "larger than" in refused(http.post("/forward_backward", content=b"\0" * (2 * MIB), headers=headers))
    bomb = zstandard.ZstdCompressor().compress(b"\0" * (512 * MIB))
    assert len(bomb) < MIB
    packed = http.post("/forward_backward", content=bomb, headers={**headers, "Content-Encoding": "zstd"})
    assert "unpacks to more than" in refused(packed)


def test_what_is_no_protobuf_is_refused(http: httpx.Client, model: str) -> None:
    headers = {"Content-Type": PROTOBUF}
    for body in (b"", b"\xff\xff", wire.ForwardBackwardRequest(model_id=model, seq_id=-1).SerializeToString()):
        assert refused(http.post("/forward_backward", content=body, headers=headers))
    assert "content-type" in refused(http.post("/forward_backward", json={"model_id": model}))
    whole = wire.ForwardBackwardRequest(model_id=model, seq_id=900, loss="cross_entropy")
    whole.data.add().input.add().text.tokens = b"\1\2\3"
    told = result(http, http.post("/forward_backward", content=whole.SerializeToString(), headers=headers))
    assert told["category"] == "user"
    assert "no multiple of 4" in told["error"]


@pytest.mark.parametrize(
    "values",
    [
        {"num_samples": 10**9},
        {"num_samples": 0},
        {"prompt": {"chunks": []}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [2**70]}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": [-1]}]}},
        {"prompt": {"chunks": [{"type": "encoded_text", "tokens": ["1"]}]}},
        {"prompt": {"chunks": [{"type": "image", "data": "", "format": "png"}]}},
        {"sampling_params": {"temperature": -1}},
        {"sampling_params": {"temperature": 1e400}},
        {"sampling_params": {"top_p": 2}},
        {"sampling_params": {"top_k": 0}},
        {"sampling_params": {"seed": 10**30}},
        {"sampling_params": {"max_tokens": 0}},
        {"sampling_params": {"stop": ["a"] * 1000}},
        {"sampling_params": {"min_p": 0.1}},
        {"topk_sample_logprobs": 10**6},
        {"prompt_logprobs_last_n": 1},
        {"record_stability_info": True},
    ],
)
def test_a_sample_that_makes_no_sense_is_refused_in_its_promise(
    http: httpx.Client, sampler: str, values: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    body = {
        "sampling_session_id": sampler,
        "seq_id": zlib.crc32(request.node.name.encode()),
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3]}]},
        "sampling_params": {},
        **values,
    }
    promise = http.post("/asample", content=json.dumps(body).replace("Infinity", "1e400"))
    if promise.status_code != 200:
        assert refused(promise)  # no JSON of numbers
        return
    assert len(promise.json()["sample_sequence_ids"]) <= MOST_SAMPLES
    assert result(http, promise)["category"] == "user"


def test_what_nobody_has_is_not_found(http: httpx.Client, session: str) -> None:
    unknown = "00000000-0000-0000-0000-000000000000"
    for answer in (
        http.post("/retrieve_future", json={"request_id": "req-0"}),
        http.post("/get_info", json={"model_id": f"{unknown}:train:0"}),
        http.post("/optim_step", json={"model_id": f"{unknown}:train:0", "seq_id": 1}),
        http.post("/session_heartbeat", json={"session_id": unknown}),
        http.get(f"/samplers/{unknown}:sample:0"),
        http.get(f"/sessions/{unknown}"),
        http.get(f"/training_runs/{unknown}:train:0"),
        http.get("/nothing"),
        http.delete(f"/training_runs/{unknown}/checkpoints/weights/x"),
        http.delete(f"/training_runs/{unknown}/checkpoints/%2e%2e%2f{session}"),
    ):
        assert answer.status_code == 404
        assert refused(answer)


def test_other_values_out_of_bounds_are_refused(http: httpx.Client, model: str) -> None:
    for path in ("/training_runs", "/checkpoints", "/sessions"):
        assert refused(http.get(path, params={"offset": str(10**30)}))
        assert refused(http.get(path, params={"limit": "-1"}))
    for ttl in (0, 10**30):
        assert refused(http.post("/save_weights", json={"model_id": model, "seq_id": 901, "ttl_seconds": ttl}))
    too_large = [{name: 1e39} for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm")]
    wrong = [{"learning_rate": "x"}, {"learning_rate": -1}, {"beta1": 1.5}, {"momentum": 0.1}, {"eps": -1}, *too_large]
    for number, adam in enumerate(wrong):
        promise = http.post("/optim_step", json={"model_id": model, "seq_id": 910 + number, "adam_params": adam})
        assert "adam_params" in result(http, promise)["error"]
    for path in ("/billing/usage/events", "/audit"):
        assert "not offered" in refused(http.get(path))
    assert "uploading code" in refused(http.post("/create_custom_loss", json={}))


def test_the_server_went_on(http: httpx.Client, server: TinkerServer) -> None:
    assert http.get("/get_server_capabilities").status_code == 200
    assert "Traceback" not in (server.folder / "log").read_text()
