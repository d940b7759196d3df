"""The official SDK of Tinker's API, unmodified, against the daemon on a real socket."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
from support.daemon.fake_trainer import gradient, logprob
from support.daemon.tinker_process import TinkerServer
from support.daemon.tinker_server import BASE
from tinker import types

from isthmus.daemon.tinker.endpoints.training_routes import MOST_MODELS
from isthmus.daemon.tokens import HUB, hash_of

pytestmark = [pytest.mark.server, pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")]

SEED = 250
WEIGHT = 1.25  # a new model's number with this seed


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, warm_module: None) -> Iterator[TinkerServer]:
    made = TinkerServer(tmp_path_factory.mktemp("tinker"))
    yield made
    made.kill()


@pytest.fixture(scope="module")
def client(server: TinkerServer) -> Iterator[tinker.ServiceClient]:
    made = tinker.ServiceClient(base_url=server.url, api_key=server.token())
    yield made
    made.close("success").result()


@pytest.fixture(scope="module")
def stranger(server: TinkerServer) -> Iterator[tinker.ServiceClient]:
    made = tinker.ServiceClient(base_url=server.url, api_key=server.token("second-token"))
    yield made
    made.close("success").result()


def model_of(client: tinker.ServiceClient, **options: Any) -> tinker.TrainingClient:
    made: tinker.TrainingClient = client.create_lora_training_client(
        base_model=BASE, **{"rank": 8, "seed": SEED, **options}
    ).result()
    return made


def datum(*tokens: int, targets: Any = None, **more: Any) -> types.Datum:
    targets = list(tokens) if targets is None else targets
    return types.Datum(
        model_input=types.ModelInput.from_ints(list(tokens)), loss_fn_inputs={"target_tokens": targets, **more}
    )


def test_the_models_are_those_that_clouds_serve(server: TinkerServer) -> None:
    rest = tinker.RestClient(base_url=server.url, api_key=server.token())
    (found,) = rest.get_server_capabilities().result().supported_models
    assert (found.model_name, found.max_context_length) == (BASE, 1000)
    assert found.trainable
    assert found.sampleable


def test_a_model_is_trained_saved_loaded_and_sampled_from(client: tinker.ServiceClient, server: TinkerServer) -> None:
    model = model_of(client)
    info = model.get_info()
    assert info.model_id == f"{client.holder.get_session_id()}:train:0"
    assert (info.model_data.model_name, info.lora_rank) == (BASE, 8)

    data = [datum(3, 4, weights=[0.0, 1.0]), datum(5, 6, 7, weights=[1.0, 0.5, 2.0])]
    losses = model.forward_backward(data, "cross_entropy")
    step = model.optim_step(types.AdamParams(learning_rate=0.5))
    first = losses.result()
    assert [output["logprobs"].tolist() for output in first.loss_fn_outputs] == [
        pytest.approx([logprob(WEIGHT, token) for token in tokens]) for tokens in ([3, 4], [5, 6, 7])
    ]
    expected = gradient([3, 4], [0.0, 1.0]) + gradient([5, 6, 7], [1.0, 0.5, 2.0])
    assert step.result().metrics == {"grad_norm:mean": pytest.approx(expected)}
    weight = WEIGHT - 0.5 * expected

    saved = model.save_state("one", ttl_seconds=3600).result().path
    assert saved == f"tinker://{model.model_id}/weights/one"
    model.forward_backward(data, "cross_entropy").result()
    model.optim_step(types.AdamParams(learning_rate=0.5)).result()
    again = client.create_training_client_from_state_with_optimizer(saved).result()
    (loaded,) = again.forward([datum(9)], "cross_entropy").result().loss_fn_outputs
    assert loaded["logprobs"].tolist() == pytest.approx([logprob(weight, 9)])

    sampler = again.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints([3, 5])
    answer = sampler.sample(
        prompt,
        2,
        types.SamplingParams(max_tokens=4, stop=[8]),
        include_prompt_logprobs=True,
        topk_sample_logprobs=2,
    ).result()
    assert [sequence.tokens for sequence in answer.sequences] == [[6, 7, 8], [7, 8]]
    assert {sequence.stop_reason for sequence in answer.sequences} == {"stop"}
    assert answer.sequences[1].logprobs == pytest.approx([-weight, -weight])
    assert answer.prompt_logprobs == [None, pytest.approx(-weight)]
    assert answer.sequences[1].topk_logprobs_np.token_ids.tolist() == [[0, 1], [0, 1]]
    assert sampler.compute_logprobs(prompt).result() == [None, pytest.approx(-weight)]
    base = client.create_sampling_client(base_model=BASE).result()
    assert base.compute_logprobs(prompt).result() == [None, -0.25]


def test_a_loss_of_the_client_s_own_and_targets_of_several_columns(client: tinker.ServiceClient) -> None:
    import torch

    model = model_of(client)
    result = model.forward_backward_custom(
        [datum(3, 4)], lambda _data, logprobs: ((logprobs[0] ** 2).sum(), {"mine:sum": 1.0})
    ).result()
    assert result.metrics["mine:sum"] == 1.0
    norm = model.optim_step(types.AdamParams(learning_rate=0.0)).result().metrics["grad_norm:mean"]
    weights = [-2 * logprob(WEIGHT, token) for token in (3, 4)]
    assert norm == pytest.approx(abs(gradient([3, 4], weights)))

    dense = torch.tensor([[3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 5]])
    sparse = types.TensorData.from_torch_sparse(dense)
    assert sparse.sparse_crow_indices is not None
    for targets in (sparse, types.TensorData.from_torch(dense)):
        (output,) = model.forward([datum(1, 2, targets=targets)], "cross_entropy").result().loss_fn_outputs
        assert output["logprobs"].to_torch().numpy() == pytest.approx(-WEIGHT * dense.numpy() / 100 - 0.5)


def test_what_is_not_offered_is_refused_by_name_in_the_promise(client: tinker.ServiceClient) -> None:
    model = model_of(client)
    for promise, said in [
        (model.forward_backward([datum(3)], "gspo"), "'gspo' is not offered"),
        (model.forward_backward([datum(3, weights=[float("nan")])], "cross_entropy"), "not finite"),
        (model.forward_backward([datum(3, targets=[3, 4])], "cross_entropy"), "2 rows"),
        (model.optim_step(types.DimuonParams(learning_rate=0.1)), "'dimuon' is not offered"),
        (model.save_state("a/b"), "no name for weights"),
        (
            model.forward_backward(
                [
                    types.Datum(
                        model_input=types.ModelInput(
                            chunks=[types.ImageChunk(data=b"\x89PNG", format="png", expected_tokens=1)]
                        ),
                        loss_fn_inputs={"target_tokens": [3]},
                    )
                ],
                "cross_entropy",
            ),
            "holds image",
        ),
    ]:
        with pytest.raises(tinker.RequestFailedError, match=said) as error:
            promise.result()
        assert error.value.category is types.RequestErrorCategory.User
    sampler = client.create_sampling_client(base_model=BASE).result()
    params = types.SamplingParams(max_tokens=1, stop=[])
    with pytest.raises(tinker.RequestFailedError, match=r"stop = \[\]"):
        sampler.sample(types.ModelInput.from_ints([3]), 1, params).result()
    with pytest.raises(tinker.RequestFailedError, match="prompt_alt_tokens_k"):
        sampler.sample(types.ModelInput.from_ints([3]), 1, types.SamplingParams(), prompt_alt_tokens_k=1).result()


def test_the_head_is_left_out_only_beside_the_rest(client: tinker.ServiceClient) -> None:
    model_of(client)  # by default attention, MLPs and the head
    with pytest.raises(tinker.RequestFailedError, match="the head of this model is tied"):
        model_of(client, train_attn=False, train_mlp=False)
    with pytest.raises(tinker.RequestFailedError, match=f"no cloud serves 'other'; there is: {BASE}"):
        client.create_lora_training_client(base_model="other", rank=8).result()


def test_lists_expiry_and_deletion(client: tinker.ServiceClient, server: TinkerServer) -> None:
    rest = tinker.RestClient(base_url=server.url, api_key=server.token())
    model = model_of(client, user_metadata={"why": "test"})
    one = model.save_state("one", user_metadata={"step": "1"}).result().path
    two = model.save_weights_for_sampler("two", ttl_seconds=3600).result().path
    model.save_weights_and_get_sampling_client().result()  # has no name, so no list has it
    run = rest.get_training_run(model.model_id).result()
    assert run.user_metadata == {"why": "test"}
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.tinker_path == one
    listed = rest.list_checkpoints(model.model_id).result().checkpoints
    assert [(found.tinker_path, found.checkpoint_type) for found in listed] == [(two, "sampler"), (one, "training")]
    assert listed[0].expires_at is not None
    assert listed[1].user_metadata == {"step": "1"}
    assert rest.get_weights_info_by_tinker_path(one).result().lora_rank == 8
    assert model.model_id in [found.training_run_id for found in rest.list_training_runs().result().training_runs]
    assert client.holder.get_session_id() in rest.list_sessions().result().sessions
    assert model.model_id in rest.get_session(client.holder.get_session_id()).result().training_run_ids
    rest.delete_checkpoint_from_tinker_path(one).result()
    assert [found.tinker_path for found in rest.list_checkpoints(model.model_id).result().checkpoints] == [two]
    with pytest.raises(tinker.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(one).result()
    with pytest.raises(tinker.BadRequestError, match="publishing is not offered"):
        rest.publish_checkpoint_from_tinker_path(two).result()
    with pytest.raises(tinker.RequestFailedError, match="there are weights at"):
        model.save_weights_for_sampler("two").result()
    with pytest.raises(tinker.RequestFailedError, match="there are no weights"):
        client.create_training_client_from_state(one).result()


def test_an_owner_sees_nothing_of_another(
    client: tinker.ServiceClient, stranger: tinker.ServiceClient, server: TinkerServer
) -> None:
    model = model_of(client)
    path = model.save_state("secret").result().path
    other = tinker.RestClient(base_url=server.url, api_key=server.token("second-token"))
    assert other.list_training_runs().result().training_runs == []
    assert other.list_user_checkpoints().result().checkpoints == []
    assert other.list_checkpoints(model.model_id).result().checkpoints == []
    session = stranger.holder.get_session_id()
    assert other.list_sessions().result().sessions == [session]
    for asked in (
        lambda: other.get_training_run(model.model_id).result(),
        lambda: other.get_weights_info_by_tinker_path(path).result(),
        lambda: other.delete_checkpoint_from_tinker_path(path).result(),
        lambda: other.get_session(client.holder.get_session_id()).result(),
        lambda: stranger.create_sampling_client(model_path=path).result(),
    ):
        with pytest.raises(tinker.NotFoundError):
            asked()
    with pytest.raises(tinker.RequestFailedError, match="there are no weights"):
        stranger.create_training_client_from_state(path).result()
    # The stranger's own client, with another's model: what asks for it is refused before it is a promise.
    theirs = model_of(stranger)
    theirs.model_id = model.model_id
    with pytest.raises(tinker.NotFoundError):
        theirs.forward_backward([datum(3)], "cross_entropy").result()
    tinker.RestClient(base_url=server.url, api_key=server.token()).delete_checkpoint_from_tinker_path(path).result()


def test_a_wrong_token_gets_nothing(server: TinkerServer) -> None:
    with pytest.raises(tinker.AuthenticationError):
        tinker.ServiceClient(base_url=server.url, api_key="tml-wrong").create_sampling_client(base_model=BASE).result()


def test_a_finished_session_is_over(server: TinkerServer) -> None:
    client = tinker.ServiceClient(base_url=server.url, api_key=server.token())
    model = model_of(client)
    session = client.holder.get_session_id()
    client.close("success").result()
    other = tinker.ServiceClient(base_url=server.url, api_key=server.token())
    replacement = model_of(other)
    replacement.model_id = model.model_id
    with pytest.raises(tinker.BadRequestError, match=f"session {session} has finished"):
        replacement.forward_backward([datum(3)], "cross_entropy").result()
    other.close("success").result()


def test_more_models_than_fit_in_memory_take_turns(client: tinker.ServiceClient, server: TinkerServer) -> None:
    models = [model_of(client) for _ in range(3)]  # two are kept, by the settings
    data = [[datum(3)], [datum(4)], [datum(5)]]
    for _ in range(2):
        for model, own in zip(models, data, strict=True):
            model.forward_backward(own, "cross_entropy").result()
    for model, own in zip(models, data, strict=True):
        norm = model.optim_step(types.AdamParams(learning_rate=0.1)).result().metrics["grad_norm:mean"]
        (token,) = own[0].model_input.to_ints()
        assert norm == pytest.approx(2 * gradient([token], [1.0]))
    assert server.questions("forget") >= 3


def test_an_owner_has_so_many_models_in_training(tmp_path: Path, warm_module: None) -> None:
    """But those of a session that is over do not count, nor another owner's."""
    server = TinkerServer(tmp_path)
    try:
        owner, again, other = (
            tinker.ServiceClient(base_url=server.url, api_key=server.token(name))
            for name in ("token", "token", "second-token")
        )
        for _ in range(MOST_MODELS - 1):
            model_of(owner)
        model_of(again)
        with pytest.raises(tinker.RequestFailedError, match=f"{MOST_MODELS} models are in training, and {MOST_MODELS}"):
            model_of(again)
        model_of(other)
        owner.close("success").result()
        model_of(again)
        for done in (again, other):
            done.close("success").result()
    finally:
        server.kill()


def test_the_tokenizer_comes_from_the_daemon(server: TinkerServer, tmp_path: Path) -> None:
    code = (
        "import tinker, sys; client = tinker.ServiceClient()\n"
        f"tokenizer = client.create_sampling_client(base_model={BASE!r}).result().get_tokenizer()\n"
        "print(tokenizer.encode('hello w7')); client.close('success').result()"
    )
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"{server.url}/hub",
        "HF_TOKEN": f"{HUB}{hash_of(server.token())}",
        "HF_HOME": str(tmp_path),
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": server.token(),
        "NO_PROXY": "127.0.0.1",
        "USE_TORCH": "0",
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[1, 7]"
    elsewhere = httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {environment['HF_TOKEN']}"})
    assert elsewhere.status_code == 401
    headers = {"Authorization": "Bearer hf_other"}
    assert httpx.head(f"{server.url}/hub/{BASE}/resolve/main/tokenizer.json", headers=headers).status_code == 401
