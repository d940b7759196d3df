"""Members out of tiny adapters: found without a defence, hidden by DP-SGD, and trained as a split run trains."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.cloud.train_runs import cloud_for_runs
from support.emulator.packages import tiny_package
from support.models.tiny import tiny_checkpoint
from support.privacy.distinct_texts import distinct_task
from torch import Tensor

from isthmus.common.errors import ConfigError, DataError
from isthmus.edge.config.training_config import TrainConfig, TuneConfig
from isthmus.edge.data.batches import Encoded, load_data
from isthmus.edge.span_cache.cache_check import edge_model
from isthmus.edge.training import methods
from isthmus.emulator.package.manifest import Tuning
from isthmus.experiments.leak.weights.local_split import LocalEmulator, LocalSplit
from isthmus.experiments.leak.weights.membership_run import (
    MembershipResult,
    MembershipSettings,
    calibrated_scores,
    measure_membership,
)
from isthmus.experiments.leak.weights.task_texts import distinct_texts, tokens_of
from isthmus.privacy.attacks.weights.membership_scores import CalibratedMembership, Candidate, LossMembership
from isthmus.privacy.defences.accountant import epsilon, sampled_epsilon, sigma_for

MEMBERS, OTHERS, TEXTS, EPOCHS = 8, 100, 116, 12


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("membership")
    return {
        "model": str(tiny_checkpoint("llama", folder / "model", num_hidden_layers=4)),
        "edge_layers": "1:1",
        "data_folder": distinct_task(folder / "data", TEXTS),
        "members": MEMBERS,
        "others": OTHERS,
        "epochs": EPOCHS,
        "batch": 4,
        "learning_rate": 2e-2,
        "defended_rate": 1e-2,
        "defence": "dp-sgd:clip=1,sigma=20",
        "threads": 1,
    }


@pytest.fixture(scope="module")
def result(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> MembershipResult:
    return measure_membership(MembershipSettings(**settings), tmp_path_factory.mktemp("runs"))


@pytest.mark.long
def test_an_undefended_adapter_tells_its_members_and_a_private_one_does_not(result: MembershipResult) -> None:
    undefended, defended = result.runs
    names = ["membership-loss", "membership-calibrated", "membership-reference"]
    assert [attack.attack for attack in undefended.attacks] == names
    assert [attack.attack for attack in defended.attacks] == [*names, "membership-reference-undefended"]
    for attack in undefended.attacks:
        assert attack.auc.value > 0.85
        assert attack.auc.low > 0.6
        assert attack.true_positive_rate.value > 0.2
    assert undefended.member_loss.high < undefended.loss.low
    for attack in defended.attacks:
        assert attack.auc.low < 0.5 < attack.auc.high
        assert attack.true_positive_rate.low <= defended.most_true_positives


def test_the_guarantee_is_the_accountants_and_the_price_is_stated(result: MembershipResult) -> None:
    undefended, defended = result.runs
    assert (undefended.epsilon, undefended.most_true_positives) == (None, 1)
    assert defended.epsilon == pytest.approx(epsilon((EPOCHS * 4 / 20**2) ** 0.5, 1e-5))
    assert defended.most_true_positives < 0.3
    assert defended.guarantee is not None
    assert "each example" in defended.guarantee
    assert result.steps == EPOCHS * 2
    assert result.loss_ratio == defended.loss.value / undefended.loss.value


def test_the_attackers_texts_are_no_candidates(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[set[tuple[int, ...]]] = []
    scored: list[tuple[set[tuple[int, ...]], Tensor]] = []
    train, scores = LocalSplit.train, LossMembership.scores

    def noted_train(split: LocalSplit, texts: Sequence[Encoded], config: TrainConfig) -> Any:
        trained.append({tuple(text.input_ids) for text in texts})
        return train(split, texts, config)

    def noted_scores(attack: LossMembership, candidates: Sequence[Candidate]) -> Tensor:
        scored.append(({tuple(each.tokens.tolist()) for each in candidates}, scores(attack, candidates)))
        return scored[-1][1]

    monkeypatch.setattr(LocalSplit, "train", noted_train)
    monkeypatch.setattr(LossMembership, "scores", noted_scores)
    measure_membership(MembershipSettings(**{**settings, "epochs": 1}), tmp_path)
    candidates = scored[0][0]
    attackers, owners = trained[:2], trained[2:]
    assert len(owners) == 2
    assert all(texts <= candidates and len(texts) == MEMBERS for texts in owners)
    assert all(texts.isdisjoint(candidates) and len(texts) == MEMBERS for texts in attackers)
    assert all(texts == candidates for texts, _ in scored)
    before, *tuned = (found for _, found in scored)
    assert len(tuned) == 4
    assert not any(torch.equal(found, before) for found in tuned)  # each reference was trained


def test_a_calibrated_score_is_the_attacks_own(settings: dict[str, Any]) -> None:
    split = LocalSplit(settings["model"], "1:1")
    texts = distinct_texts("e2e", settings["data_folder"], split.tokenizer, 3)
    candidates = [Candidate(tokens_of(text)) for text in texts]
    tuned, reference = split.edge(), split.edge()
    with torch.no_grad():
        tuned.lm_head.weight.mul_(1.1)
    before, after = (LossMembership(model).scores(candidates) for model in (reference, tuned))
    wanted = CalibratedMembership(tuned, reference).scores(candidates)
    torch.testing.assert_close(calibrated_scores(before, after), wanted)
    assert not torch.allclose(calibrated_scores(after, before), wanted)


def test_a_local_run_trains_the_adapter_of_the_split_run_bit_for_bit(tmp_path: Path) -> None:
    with cloud_for_runs(tmp_path) as runs:
        runs.train(tmp_path / "split", validation_split=0.0)
        config = runs.config(tmp_path / "local", validation_split=0.0)
    split = LocalSplit(str(runs.model), "1:1")
    split.train(load_data(config, split.tokenizer).train, config)
    other = config.model_copy(update={"out": tmp_path / "other", "seed": 1})
    split.train(load_data(config, split.tokenizer).train, other)
    adapters = [load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("split", "local")]
    control = load_file(tmp_path / "other" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
    assert not all(torch.equal(adapters[0][name], control[name]) for name in control)


def test_each_prompt_is_there_once_and_too_few_are_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    split = LocalSplit(settings["model"], "1:1")
    folder = settings["data_folder"]
    texts = distinct_texts("e2e", folder, split.tokenizer, TEXTS)
    assert len({text.input_ids for text in texts}) == TEXTS
    assert distinct_texts("e2e", folder, split.tokenizer, TEXTS, seed=1) != texts
    with pytest.raises(DataError, match=f"{TEXTS} texts with prompts of their own, and {TEXTS + 1} are asked for"):
        distinct_texts("e2e", folder, split.tokenizer, TEXTS + 1)
    with pytest.raises(ConfigError, match="others = 99 are too few"):
        measure_membership(MembershipSettings(**{**settings, "others": 99}), tmp_path)
    with pytest.raises(ConfigError, match="no defence"):
        measure_membership(MembershipSettings(**{**settings, "defence": "dp"}), tmp_path)


# Over an emulator -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def over_a_package(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("package") / "package"
    advice = Tuning(learning_rate=0.02, steps=5, rank=3, warmup_steps=1)
    package = tiny_package(folder, Path(settings["model"]), plan="1:2", keep=1.0, tuning=advice)
    return {**settings, "package": package.folder}


def test_members_of_an_adapter_that_was_tuned_over_an_emulator(
    over_a_package: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned: list[Any] = []
    train = LocalEmulator.train

    def noted(self: LocalEmulator, texts: Sequence[Encoded], config: TuneConfig) -> Any:
        tuned.append((self, *train(self, texts, config)))
        return tuned[-1][1:]

    monkeypatch.setattr(LocalEmulator, "train", noted)
    settings = MembershipSettings(**{**over_a_package, "epochs": 15, "epsilons": (0.5,)})
    result = measure_membership(settings, tmp_path)
    plain, strict = result.runs
    (found,) = (attack for attack in plain.attacks if attack.attack == "membership-reference")
    assert found.auc.low > 0.6  # a run that memorizes
    assert result.control.low < 0.5 < result.control.high  # and nobody is told by a model that nobody tuned
    assert plain.member_loss.high < plain.loss.low
    assert plain.epsilon is None
    assert strict.epsilon is not None
    assert 0.49 < strict.epsilon <= 0.5
    assert "whose amplification is counted" in str(strict.guarantee)
    (found,) = (attack for attack in strict.attacks if attack.attack == "membership-reference")
    assert found.auc.low < 0.5 < found.auc.high
    # What is attacked has the model's own middle, and the adapters above alone.
    assert len(tuned) == 4
    for split, model, _ in tuned:
        assert edge_model(model).remote_layers.span is split.span
        assert {int(name.split("layers.")[1].split(".")[0]) for name in methods.trained(model)} == {2, 3}


def test_settings_that_do_not_go_together_are_refused(over_a_package: dict[str, Any], tmp_path: Path) -> None:
    for values, why in (
        ({"package": None, "epsilons": (8.0,)}, "give --package"),
        ({"epsilons": (8.0,), "defence": "smoothing:share=.1"}, "--defence dp-sgd"),
        ({"epsilons": (1e-4,)}, "give a larger epsilon"),
        ({"epsilons": (0.0,)}, "epsilon 0 is no finite number above 0"),
        ({"model": str(tiny_checkpoint("llama", tmp_path / "model", num_hidden_layers=5))}, "of another model"),
        ({"members": 1}, "members = 1 and others = 100 are too few: give 2 members or more, and 100 others or more"),
    ):
        with pytest.raises(ConfigError, match=why) as refused:
            measure_membership(MembershipSettings(**{**over_a_package, **values}), tmp_path / "runs")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("wanted", [0.0, -1.0, math.inf, math.nan])
def test_an_epsilon_that_no_noise_gives_is_refused(wanted: float) -> None:
    with pytest.raises(ConfigError, match=f"^epsilon {wanted:g} is no finite number above 0: give one"):
        sigma_for(wanted, 0.1, 100, 1e-5)


def test_the_least_sigma_is_found() -> None:
    sigma = sigma_for(3, 0.1, 100, 1e-5)
    assert sampled_epsilon(sigma, 0.1, 100, 1e-5) <= 3 < sampled_epsilon(sigma - 2e-4, 0.1, 100, 1e-5)
