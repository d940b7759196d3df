"""A draft that is distilled beside a run: it comes nearer to the model, and the run is the one without it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.cloud.train_runs import Runs, cloud_for_runs
from support.emulator.packages import tiny_package
from support.models import draft_run as program
from support.models.draft_run import PLAN, draft_run
from support.models.small_training import Wire, config
from support.models.tiny import tiny_checkpoint
from support.run_folders import losses, same
from support.warm_processes import warm
from torch import Tensor

from isthmus.common.errors import CheckpointError, ConfigError, ConsentError, NonFiniteError, PackageError
from isthmus.edge.config.training_config import load_config
from isthmus.edge.drafts.tuned_draft import TUNED_DRAFT
from isthmus.edge.run_report import linear_parameters
from isthmus.edge.training.draft_tuning import DraftTuning
from isthmus.edge.training.methods import trained
from isthmus.emulator.package.package import Package
from isthmus.protocol.secure.keys import load_worker

METHODS: list[dict[str, Any]] = [
    {"method": "lora"},
    {"method": "lora", "optimizer": "lora-plus"},
    {"method": "lora", "optimizer": "lora-fa", "dropout": 0.0},
    {"method": "lora", "precision": "bf16"},
    {"method": "lora", "accumulate": 2},
    {"method": "dora"},
    {"method": "ia3"},
    {"method": "vera"},
    {"method": "adalora"},
    {"method": "bottleneck"},
    {"method": "low_rank"},
    {"method": "full"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("drafted") / "model", num_hidden_layers=6)


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    """Two of the middle's four layers, with their owner's consent."""
    return tiny_package(folder.parent / "package", folder, plan=PLAN, allow_draft_tuning=True)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Package:
    """All layers of the middle."""
    return tiny_package(folder.parent / "whole", folder, plan=PLAN, keep=1.0, allow_draft_tuning=True)


@pytest.fixture(scope="module")
def undisturbed(folder: Path, package: Package) -> Path:
    """The folder of a run with a draft that nothing stopped."""
    out = folder.parent / "undisturbed"
    draft_run(folder, config(out, draft=str(package.folder)))[0].fit()
    return out


def adapter(out: Path) -> dict[str, Tensor]:
    """What a run has trained, whatever its method calls its file."""
    return {name: value for path in (out / "adapter").glob("*.safetensors") for name, value in load_file(path).items()}


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def without_draft(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if not name.startswith("draft")} for line in losses(out)]


# The run ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", METHODS, ids=lambda values: "-".join(map(str, values.values())))
def test_a_run_with_a_draft_has_the_bits_of_one_without(
    folder: Path, whole: Package, package: Package, tmp_path: Path, values: dict[str, Any]
) -> None:
    """And the draft has the adapter: with all of the middle's layers it is the model, at every step."""
    options = {"steps": 6, "dropout": 0.2, **values}
    draft_run(folder, config(tmp_path / "plain", **options))[0].fit()
    draft_run(folder, config(tmp_path / "drafted", draft=str(package.folder), **options))[0].fit()
    assert losses(tmp_path / "plain") == without_draft(tmp_path / "drafted")
    assert same(adapter(tmp_path / "plain"), adapter(tmp_path / "drafted"))
    assert not (tmp_path / "plain" / TUNED_DRAFT).exists()
    still = {**options, "dropout": 0.0, "draft": str(whole.folder), "draft_learning_rate": 1e-20}
    draft_run(folder, config(tmp_path / "whole", **still))[0].fit()
    near = 1e-2 if values.get("precision") == "bf16" else 1e-6
    assert max(line["draft_kl"] for line in losses(tmp_path / "whole")) < near
    assert min(line["draft_kl"] for line in losses(tmp_path / "drafted")) > 10 * near


def alike(draft: DraftTuning, model: Any) -> bool:
    """Whether the student's weights are the model's, as they are now, and none of them is trained."""
    theirs = dict(model.named_parameters())
    return all(
        own.data_ptr() == theirs[name].data_ptr() and torch.equal(own, theirs[name]) and not own.requires_grad
        for name, own in draft._student.named_parameters()
    )


@pytest.mark.parametrize("values", METHODS, ids=lambda values: "-".join(map(str, values.values())))
def test_the_student_has_the_adapter_as_it_is_now_and_no_graph_below_the_emulator(
    folder: Path, package: Package, tmp_path: Path, values: dict[str, Any]
) -> None:
    options = {"steps": 6, "draft": str(package.folder), **values}
    with pytest.raises(KeyboardInterrupt):
        draft_run(folder, config(tmp_path, **options), Wire("begin", 5, interrupt))[0].fit()
    run, draft = draft_run(folder, config(tmp_path, resume=True, **options))
    assert draft is not None
    graphs: list[tuple[bool, bool]] = []
    draft._emulator.register_forward_hook(
        lambda _module, given, output: graphs.append((given[0].requires_grad, output.requires_grad))
    )
    model = run.model.get_base_model() if hasattr(run.model, "get_base_model") else run.model
    start = {name: weight.detach().clone() for name, weight in trained(model).items()}
    run.fit()
    assert set(graphs) == {(False, True)}
    assert any(not torch.equal(weight, start[name]) for name, weight in trained(model).items())
    assert alike(draft, model)
    weight = next(iter(trained(model).values()))
    weight.data = weight.data.clone()  # a weight that the student no longer shares is seen
    assert not alike(draft, model)


def test_a_student_that_draws_random_numbers_would_be_seen(folder: Path, package: Package, tmp_path: Path) -> None:
    draft_run(folder, config(tmp_path / "plain"))[0].fit()
    run, draft = draft_run(folder, config(tmp_path / "drafted", draft=str(package.folder)))
    assert draft is not None
    draft._student.train()
    run.fit()
    assert not same(adapter(tmp_path / "plain"), adapter(tmp_path / "drafted"))


@pytest.mark.parametrize("recipe", ["uniform", "uniform+int8"])
def test_the_draft_comes_nearer_to_the_model(folder: Path, tmp_path: Path, recipe: str) -> None:
    made = tiny_package(tmp_path / "package", folder, plan=PLAN, recipe=recipe, allow_draft_tuning=True)
    options = {"draft": str(made.folder), "draft_learning_rate": 3e-3, "steps": 60, "schedule": "constant"}
    report = draft_run(folder, config(tmp_path / "out", dropout=0.0, **options))[0].fit().report
    assert report.draft_kl_first is not None
    assert report.draft_kl_last is not None
    assert report.draft_kl_last < report.draft_kl_first / 2
    assert report.draft_agreement_last is not None
    assert report.draft_agreement_first is not None
    assert report.draft_agreement_last > report.draft_agreement_first
    log = losses(tmp_path / "out")
    assert report.draft_kl_last == pytest.approx(sum(line["draft_kl"] for line in log[-10:]) / 10)
    with safe_open(tmp_path / "out" / TUNED_DRAFT, framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {"format": "isthmus tuned draft 1", "package": made.id}
    assert "draft: KL divergence" in report.lines(tmp_path)


def test_the_flops_of_the_edge_are_those_of_the_student_as_well(folder: Path, package: Package, tmp_path: Path) -> None:
    plain = draft_run(folder, config(tmp_path / "plain"))[0].fit().report
    run, draft = draft_run(folder, config(tmp_path / "drafted", draft=str(package.folder)))
    drafted = run.fit().report
    assert draft is not None
    emulator = linear_parameters(draft._emulator)
    assert draft.n_trained > emulator > 0  # its norms are no linear layers
    more = 4 * (linear_parameters(run.model) + emulator) + 2 * draft.n_trained
    assert drafted.edge_flops - plain.edge_flops == more * plain.positions
    assert drafted.cloud_flops == plain.cloud_flops


def test_a_gradient_that_is_not_finite_ends_the_run(folder: Path, package: Package, tmp_path: Path) -> None:
    run, draft = draft_run(folder, config(tmp_path, draft=str(package.folder)))
    assert draft is not None
    with torch.no_grad():
        next(iter(draft._weights.values())).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"draft's KL divergence in step 1 is nan: lower --draft-learning-rate"):
        run.fit()


# Going on ------------------------------------------------------------------------------------------------------------


def same_draft(ours: Path, theirs: Path) -> bool:
    return same(load_file(ours / TUNED_DRAFT), load_file(theirs / TUNED_DRAFT))


def interrupted(folder: Path, out: Path, package: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        draft_run(folder, config(out, draft=str(package)), Wire("begin", 5, interrupt))[0].fit()


def killed(folder: Path, out: Path, package: Path) -> None:
    words = [str(folder), str(out), "applied", "5", f"draft={package}"]
    ended = warm().run(words, dict(os.environ), out.parent, 240, program=program.__file__)
    assert ended.returncode == -signal.SIGKILL, ended.stderr


@pytest.mark.parametrize("stop", [interrupted, killed])
def test_a_resumed_run_has_the_draft_of_an_undisturbed_one(
    folder: Path, package: Package, undisturbed: Path, tmp_path: Path, stop: Callable[[Path, Path, Path], None]
) -> None:
    out = tmp_path / "out"
    stop(folder, out, package.folder)
    assert not (out / TUNED_DRAFT).exists()
    draft_run(folder, config(out, draft=str(package.folder), resume=True))[0].fit()
    assert losses(out) == losses(undisturbed)
    assert same_draft(out, undisturbed)


def test_a_draft_that_is_not_restored_would_be_seen(
    folder: Path, package: Package, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(folder, tmp_path, package.folder)
    run, draft = draft_run(folder, config(tmp_path, draft=str(package.folder), resume=True))
    monkeypatch.setattr(type(draft), "load", lambda *_: None)
    run.fit()
    assert not same_draft(tmp_path, undisturbed)


def test_a_run_is_resumed_with_its_draft(folder: Path, package: Package, whole: Package, tmp_path: Path) -> None:
    interrupted(folder, tmp_path, package.folder)
    for values, what in (
        ({}, "the draft's package was"),
        ({"draft": str(whole.folder)}, "the draft's package was"),
        ({"draft": str(package.folder), "draft_learning_rate": 2e-3}, "draft_learning_rate was 0.001"),
    ):
        with pytest.raises(CheckpointError, match=what):
            draft_run(folder, config(tmp_path, resume=True, **values))[0].fit()
    (tmp_path / "checkpoint-4" / "draft.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"draft.safetensors is damaged"):
        draft_run(folder, config(tmp_path, resume=True, draft=str(package.folder)))[0].fit()


# What is refused -----------------------------------------------------------------------------------------------------


def test_without_consent_nothing_is_tuned(folder: Path, tmp_path: Path) -> None:
    made = tiny_package(tmp_path / "package", folder, plan=PLAN)
    with pytest.raises(ConsentError, match=r"package'.*emulator build --allow-draft-tuning"):
        draft_run(folder, config(tmp_path / "out", draft=str(made.folder)))
    assert ConsentError.exit_code == 29


def test_a_package_of_another_plan_or_none_is_refused(folder: Path, tmp_path: Path) -> None:
    made = tiny_package(tmp_path / "package", folder, plan="2:2", allow_draft_tuning=True)
    for name in (made.folder, tmp_path / "nothing"):
        with pytest.raises(PackageError):
            draft_run(folder, config(tmp_path / "out", draft=str(name)))


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"method": "prompt"}, "which method prompt does not support"),
        ({"method": "ladder"}, "which method ladder does not support"),
        ({"optimizer": "mezo", "dropout": 0.0}, "mezo's forwards run with perturbed parameters"),
        ({"method": "dora", "sites": "all"}, "adapters of method dora inside the cloud's layers"),
    ],
)
def test_what_cannot_be_drafted_for_is_refused_by_name(tmp_path: Path, values: dict[str, Any], why: str) -> None:
    given = {"cloud": "c.txt", "data": "d.jsonl", **values}
    with pytest.raises(ConfigError, match=why):
        load_config(None, {**given, "draft": "package"})
    for nothing in ("none", "ngram"):  # the latter of a file that is shared with `edge generate`
        assert load_config(None, {**given, "draft": nothing}).draft_package is None


# Over a cloud --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with cloud_for_runs(tmp_path_factory.mktemp("cloud"), layers=6) as cloud:
        yield cloud


@pytest.fixture(scope="module")
def draft(runs: Runs) -> Path:
    """A package of the cloud's own signer."""
    signer = load_worker(runs.server.home.folder)
    out = runs.model.parent / "package"
    return tiny_package(out, runs.model, plan=PLAN, signer=signer, allow_draft_tuning=True).folder


@pytest.mark.parametrize("values", [{"overlap": 2}, {"sites": "all", "method": "lora"}], ids=["overlap", "sites"])
def test_over_a_cloud(runs: Runs, draft: Path, tmp_path: Path, values: dict[str, Any]) -> None:
    plain = runs.train(tmp_path / "plain", **values)
    drafted = runs.train(tmp_path / "drafted", draft=str(draft), **values)
    assert losses(tmp_path / "plain") == without_draft(tmp_path / "drafted")
    assert same(adapter(tmp_path / "plain"), adapter(tmp_path / "drafted"))
    assert (drafted.bytes_up, drafted.calls) == (plain.bytes_up, plain.calls)  # it asks nothing of the cloud
    if "overlap" in values:
        runs.train(tmp_path / "one", draft=str(draft))
        assert same_draft(tmp_path / "one", tmp_path / "drafted")
        assert not same_draft(tmp_path / "one", _other_seed(runs, draft, tmp_path))
    state = json.loads((tmp_path / "drafted" / "checkpoint-3" / "state.json").read_text())
    assert {"draft.safetensors", "draft_optimizer.safetensors"} <= set(state["sha256"])


def _other_seed(runs: Runs, draft: Path, folder: Path) -> Path:
    runs.train(folder / "other", draft=str(draft), seed=1)
    return folder / "other"


def test_a_package_of_another_signer_is_refused(runs: Runs, tmp_path: Path) -> None:
    made = tiny_package(tmp_path / "package", runs.model, plan=PLAN, allow_draft_tuning=True)
    with pytest.raises(PermissionError, match="signed under the root key"):
        runs.train(tmp_path / "out", draft=str(made.folder))


def test_a_run_goes_on_from_the_draft_of_its_adapters_run(runs: Runs, draft: Path, tmp_path: Path) -> None:
    runs.train(tmp_path / "first", draft=str(draft), steps=20, draft_learning_rate=3e-3)
    options = {"start_from": tmp_path / "first" / "adapter", "steps": 1, "draft": str(draft)}
    runs.train(tmp_path / "on", **options)
    (tmp_path / "first" / TUNED_DRAFT).rename(tmp_path / "elsewhere")
    runs.train(tmp_path / "anew", **options)
    on, anew = (losses(tmp_path / name)[0]["draft_kl"] for name in ("on", "anew"))
    assert on < anew / 2
