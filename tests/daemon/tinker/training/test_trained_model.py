"""Models in training against a real cloud: losses, gradients, steps, and what failures and other models leave alone."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.train_runs import Runs, cloud_for_runs
from support.daemon.local_trainer import ADAM, LocalTrainer, near, random_data, sampled_data, whole_logprobs
from support.run_folders import same
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.backbone.adapters.adapter_files import load_adapter
from isthmus.common import files
from isthmus.common.errors import ConfigError, DiskError, NonFiniteError, UnreachableError
from isthmus.daemon.tinker.training import datum_batches
from isthmus.daemon.tinker.training.loss_functions import NAMES, loss_named
from isthmus.daemon.tinker.training.trained_model import LostGradientsError

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("trained")) as started:
        yield started


@pytest.fixture
def trainer(runs: Runs, tmp_path: Path) -> Iterator[LocalTrainer]:
    with LocalTrainer(runs, tmp_path) as started:
        yield started


def reference(trainer: LocalTrainer, name: str, config: dict[str, float], data: list[Any]) -> tuple[float, Any, Any]:
    """The loss, each datum's log probabilities, and the gradients, of the whole model in this process, row by row."""
    whole: Any = AutoModelForCausalLM.from_pretrained(trainer.runs.model, dtype=torch.float32)
    tuned = load_adapter(whole, trainer.save(), trainable=True)
    loss, total, logprobs = loss_named(name, config), torch.zeros(()), []
    for datum in data:
        found = whole_logprobs(tuned(input_ids=torch.tensor([datum["tokens"]])).logits, datum["targets"])
        logprobs.append(found.tolist())
        total = total + loss(found, {key: torch.tensor(datum[key]) for key in loss.inputs})
    total.backward()  # type: ignore[no-untyped-call]
    gradients = {key: each.grad for key, each in tuned.named_parameters() if each.grad is not None}
    return total.item(), logprobs, gradients


CONFIGS = {"dro": {"beta": 0.2}}


@pytest.mark.parametrize("layers", ["edge", "all"])
def test_losses_and_gradients_are_those_of_the_whole_model(trainer: LocalTrainer, layers: str) -> None:
    trainer.create(layers=layers)
    trainer.train(range(1, 3))  # B is no longer zero
    gradients: dict[str, dict[str, Tensor]] = {}
    for name in NAMES:
        data = random_data(9) if name == "cross_entropy" else sampled_data(9)
        values, config = trainer.values(), CONFIGS.get(name, {})
        answer = trainer.forward_backward(data, loss=name, loss_config=config)
        loss, logprobs, slopes = reference(trainer, name, config, data)
        assert answer["metrics"] == {"loss:sum": pytest.approx(loss, rel=1e-4, abs=1e-4)}
        for output, wanted in zip(answer["outputs"], logprobs, strict=True):
            assert output == {"logprobs": pytest.approx(wanted, abs=1e-4)}
        gradients[name] = trainer.gradients()
        assert near(gradients[name], slopes, 1e-3), name
        assert same(trainer.values(), values)
        assert len(slopes) == 2 * 7 * (4 if layers == "all" else 2)
        trainer.load(trainer.save())  # forgets gradients
        assert trainer.gradients() == {}
    for one, other in itertools.combinations(NAMES, 2):
        assert not near(gradients[one], gradients[other], 1e-3)


def test_several_targets_count_each_by_its_weight(trainer: LocalTrainer) -> None:
    trainer.create()
    trainer.train(range(1, 2))
    first, second = random_data(5, (6,))[0], random_data(6, (6,))[0]
    second["tokens"] = first["tokens"]
    both = {
        "tokens": first["tokens"],
        **{key: [list(row) for row in zip(first[key], second[key], strict=True)] for key in ("targets", "weights")},
    }
    one, other = (trainer.forward_backward([each], forward_only=True) for each in (first, second))
    together = trainer.forward_backward([both, first])
    rows = zip(one["outputs"][0]["logprobs"], other["outputs"][0]["logprobs"], strict=True)
    assert together["outputs"][0]["logprobs"] == [pytest.approx(row, abs=1e-5) for row in rows]
    assert together["outputs"][1]["logprobs"] == pytest.approx(one["outputs"][0]["logprobs"], abs=1e-5)
    losses = [answer["metrics"]["loss:sum"] for answer in (one, one, other)]
    assert together["metrics"]["loss:sum"] == pytest.approx(sum(losses), abs=1e-4)
    summed = trainer.gradients()
    trainer.step(2)
    trainer.create("b")
    trainer.train(range(1, 2), "b")
    for each in (first, second, first):
        trainer.forward_backward([each], "b")
    assert near(trainer.gradients("b"), summed, 1e-5)


def test_forward_alone_leaves_gradients_and_gives_the_same_numbers(trainer: LocalTrainer) -> None:
    trainer.create()
    trainer.train(range(1, 2))
    trainer.forward_backward(random_data(1))
    before = trainer.gradients()
    alone = trainer.forward_backward(random_data(2), forward_only=True)
    assert same(trainer.gradients(), before)
    assert trainer.handlers.state({})["models"] == {"a": {"number": 1, "calls": 1}}
    assert trainer.forward_backward(random_data(2)) == alone
    assert not same(trainer.gradients(), before)


def test_calls_add_up_to_one_with_all_data(trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit where the micro-batches are the same ones, else up to rounding."""
    data = random_data(4, (9, 5, 12, 7))
    found = []
    for positions, calls in ((10, [data]), (10, [data[:2], data[2:]]), (4096, [data])):
        monkeypatch.setattr(datum_batches, "POSITIONS", positions)
        trainer.create()
        losses = [trainer.forward_backward(each)["metrics"]["loss:sum"] for each in calls]
        found.append((sum(losses), trainer.gradients()))
    assert found[0][0] == found[1][0]
    assert same(found[0][1], found[1][1])
    assert found[2][0] == pytest.approx(found[0][0], rel=1e-6)
    assert near(found[2][1], found[0][1], 1e-5)
    trainer.create()
    trainer.forward_backward(data[:2])
    assert not near(trainer.gradients(), found[0][1], 1e-2)


def test_a_model_is_the_same_with_others_beside_it(trainer: LocalTrainer) -> None:
    trainer.create()
    alone = trainer.train(range(1, 4))
    adapter = trainer.adapter()
    trainer.create("x", seed=3)
    trainer.create("y", seed=4, rank=8, mlp=False)
    trainer.create("z", layers="all", unembed=True)
    together = []
    for number in range(1, 4):
        for name in "yxz":
            answer = trainer.forward_backward(random_data(number), name)
            if name == "x":
                together.append(answer["metrics"]["loss:sum"])
            trainer.forward_backward(random_data(17), name, forward_only=True)
        for name in "zxy":
            trainer.step(number, name)
    assert together == alone
    assert same(trainer.adapter("x"), adapter)
    assert not same(trainer.adapter("z"), adapter)
    own, other = trainer.model("x"), trainer.model("y")
    assert own.cloud is other.cloud


def test_a_cloud_that_is_away_leaves_nothing_half_applied(
    trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datum_batches, "POSITIONS", 10)  # a micro-batch for each datum
    trainer.create()
    undisturbed = trainer.train(range(1, 3))
    adapter = trainer.adapter()
    trainer.create("b")
    trainer.train(range(1, 2), "b")
    trainer.forward_backward(random_data(2), "b")
    gradients = trainer.gradients("b")
    link = trainer.model("b").cloud.link
    backwards = itertools.count(1)

    def away(question: str, phase: str) -> None:
        if question == "backward" and phase == "sending" and next(backwards) == 2:
            raise UnreachableError("away.")

    phases = set()
    monkeypatch.setattr(link, "observer", lambda question, phase: phases.add((question, phase)))
    trainer.forward_backward(random_data(3), "b", forward_only=True)
    assert phases
    monkeypatch.setattr(link, "observer", away)
    with pytest.raises(UnreachableError) as caught:
        trainer.forward_backward(random_data(3), "b")
    assert caught.value.exit_code == 40
    assert next(backwards) > 2
    assert same(trainer.gradients("b"), gradients)
    assert trainer.model("b").calls == 1
    link.drop()  # the next call opens another session
    trainer.step(2, "b")
    assert same(trainer.adapter("b"), adapter)
    assert len(undisturbed) == 2


def test_a_cloud_that_was_never_there_is_said_so(trainer: LocalTrainer) -> None:
    host = "127.0.0.1:1"
    address = trainer.runs.server.address.replace(f"127.0.0.1:{trainer.runs.server.port}", host)
    cloud = {"cloud": address, "key": str(trainer.runs.server.home.key_file), "connect_timeout": 0.2}
    with pytest.raises(UnreachableError) as caught:
        trainer.create(cloud=cloud)
    assert caught.value.exit_code == 40
    assert trainer.handlers.state({})["clouds"] == 0


def test_a_full_disk_leaves_the_model_as_it_was(trainer: LocalTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.create()
    trainer.train(range(1, 3))
    adapter = trainer.adapter()
    trainer.create("b")
    trainer.train(range(1, 2), "b")
    trainer.forward_backward(random_data(2), "b")
    values, gradients = trainer.values("b"), trainer.gradients("b")
    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", _full)
        with pytest.raises(DiskError):
            trainer.step(2, "b")
    assert same(trainer.values("b"), values)
    assert same(trainer.gradients("b"), gradients)
    trainer.step(2, "b")
    assert same(trainer.adapter("b"), adapter)


def _full(_path: Path) -> None:
    raise OSError(28, "No space left on device")


def test_numbers_that_are_not_finite_leave_the_model_as_it_was(trainer: LocalTrainer) -> None:
    trainer.create()
    trainer.forward_backward(random_data(1))
    gradients = trainer.gradients()
    far = sampled_data(2)
    far[0]["logprobs"] = [-1000.0] * len(far[0]["logprobs"])
    with pytest.raises(NonFiniteError, match="importance_sampling"):
        trainer.forward_backward(far, loss="importance_sampling")
    assert same(trainer.gradients(), gradients)


def test_a_step_is_made_once(trainer: LocalTrainer) -> None:
    trainer.create()
    trainer.forward_backward(random_data(1))
    first = trainer.step(4)
    assert first["metrics"]["grad_norm:mean"] > 0
    values = trainer.values()
    trainer.forward_backward(random_data(2))
    gradients = trainer.gradients()
    assert trainer.step(4) == first
    assert same(trainer.values(), values)
    assert same(trainer.gradients(), gradients)
    with pytest.raises(ConfigError, match="step 3 comes after step 4"):
        trainer.step(3)
    trainer.step(9)
    assert not same(trainer.values(), values)
    with pytest.raises(ConfigError, match="step 10 has no gradients"):
        trainer.step(10)
    trainer.forward_backward(random_data(3))
    values = trainer.values()
    question = {"model": "a", "number": 10, "adam": ADAM, "calls": 2}
    with pytest.raises(LostGradientsError, match="of 2 calls of forward_backward, and there are those of 1"):
        trainer.handlers.optim_step(question)
    assert same(trainer.values(), values)
    trainer.handlers.optim_step({**question, "calls": 1})
    assert not same(trainer.values(), values)


def test_a_load_is_made_once(trainer: LocalTrainer) -> None:
    trainer.create()
    copy = trainer.save()
    trainer.train(range(1, 3))
    question = {"model": "a", "number": 5, "folder": str(copy), "optimizer": False}
    trainer.handlers.load(question)
    loaded = trainer.values()
    trainer.forward_backward(random_data(2))
    gradients = trainer.gradients()
    trainer.handlers.load(question)
    assert same(trainer.gradients(), gradients)
    with pytest.raises(ConfigError, match="load 4 comes after step 5"):
        trainer.handlers.load({**question, "number": 4})
    trainer.handlers.forget({"model": "a"})
    assert trainer.create()["saved"] == 5  # the state on the disk says which load it has
    assert same(trainer.values(), loaded)
    trainer.forward_backward(random_data(2))
    trainer.handlers.load({**question, "number": 6})  # the control: another one is made
    assert trainer.gradients() == {}


def test_adam_is_as_it_is_asked_for(trainer: LocalTrainer) -> None:
    """By the formula of AdamW, with settings that change between the steps."""
    trainer.create()
    wanted = {name: value.double() for name, value in trainer.values().items()}
    first = {name: torch.zeros_like(value) for name, value in wanted.items()}
    second = {name: torch.zeros_like(value) for name, value in wanted.items()}
    for number, (rate, decay, clip) in enumerate([(1e-2, 0.0, 0.0), (3e-2, 0.1, 0.5)], 1):
        beta1, beta2, eps = 0.8, 0.9, 1e-6
        trainer.forward_backward(random_data(number))
        gradients = {name: value.double() for name, value in trainer.gradients().items()}
        norm = float(torch.stack([value.norm() for value in gradients.values()]).norm())
        scale = min(1.0, clip / norm) if clip else 1.0
        assert clip == 0.0 or scale < 1
        trainer.step(number, learning_rate=rate, weight_decay=decay, grad_clip_norm=clip, beta1=0.8, beta2=0.9, eps=eps)
        for name, value in wanted.items():
            gradient = scale * gradients[name]
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            root = (second[name] / (1 - beta2**number)).sqrt() + eps
            wanted[name] = value * (1 - rate * decay) - rate * first[name] / (1 - beta1**number) / root
        assert near({name: value.double() for name, value in trainer.values().items()}, wanted, 1e-4)
