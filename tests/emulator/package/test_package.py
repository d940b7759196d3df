from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models.tiny import HIDDEN, tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.common.errors import (
    CheckpointError,
    ConfigError,
    FingerprintError,
    OwnershipError,
    PackageError,
    SignerError,
)
from isthmus.emulator.compress.bridges import Bridge
from isthmus.emulator.compress.emulator_model import build_emulator
from isthmus.emulator.compress.recipe import Recipe
from isthmus.emulator.package import package as packages
from isthmus.emulator.package.build import check_free
from isthmus.emulator.package.package import (
    Package,
    is_package,
    open_package,
    sign_package,
    write_package,
)
from isthmus.emulator.package.verification import check_package_fits
from isthmus.protocol.secure.keys import WorkerIdentity, generate_root, issue_worker, load_worker

PLAN = SplitPlan(6, 1, 1)
IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> WorkerIdentity:
    return worker(tmp_path_factory.mktemp("keys"))


def worker(home: Path) -> WorkerIdentity:
    generate_root(home)
    issue_worker(home)
    return load_worker(home)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_checkpoint("llama", tmp_path_factory.mktemp("model")), "tiny-llama")


def write(
    folder: Path, checkpoint: Checkpoint, signer: WorkerIdentity, recipe: str = "uniform", **options: Any
) -> Package:
    text = torch.randint(3, 259, (32, 16), generator=torch.Generator().manual_seed(0))
    emulator = build_emulator(checkpoint, PLAN, Recipe.parse(recipe, 0.5), text)
    return write_package(folder, checkpoint, PLAN, emulator, **{"signer": signer, "licence": "for tests", **options})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, checkpoint: Checkpoint, signer: WorkerIdentity) -> Package:
    return write(tmp_path_factory.mktemp("packages") / "p", checkpoint, signer)


@pytest.fixture
def folder(original: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original.folder, tmp_path / "p"))


def row(package: Package, **changes: Any) -> dict[str, Any]:
    scores = {"full_zero_shot": 4.0, "plug_in": 2.5, "thief": 3.5, "plug_in_recovery": 0.75, "thief_recovery": 0.25}
    emulator = package.manifest.files["emulator.safetensors"].sha256
    return {"task": "e2e", "metric": "perplexity", "seeds": 3, "emulator": emulator, **scores, **changes}


def test_a_package_says_what_it_is(original: Package, checkpoint: Checkpoint, signer: WorkerIdentity) -> None:
    package = open_package(original.folder, signer=signer.pin)
    said = package.manifest
    assert package.id == original.id
    assert package.signer == signer.pin
    assert (package.model, package.digest, package.plan) == ("tiny-llama", checkpoint.digest(), PLAN)
    assert said.layers == (1, 4)
    assert said.emulator_params * 2 == said.middle_params
    assert said.share_of_parameters == 0.5
    assert said.middle_bytes == 4 * said.middle_params
    assert said.emulator_bytes == (original.folder / "emulator.safetensors").stat().st_size
    assert said.protection == ()
    assert said.files.keys() == {file.name for file in original.folder.iterdir()} - {"manifest.json"}
    assert str(checkpoint.folder) not in (original.folder / "manifest.json").read_text()


def test_the_model_of_a_package_runs_over_the_emulator(original: Package, checkpoint: Checkpoint) -> None:
    model = original.load_model()
    again = original.load_model()
    assert model.split_plan == PLAN
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(logits, again(IDS).logits)
    assert logits.shape[:2] == IDS.shape
    assert original.load_tokenizer()("a")["input_ids"]


def test_quantized_and_factored_emulators_come_back(
    tmp_path: Path, checkpoint: Checkpoint, signer: WorkerIdentity
) -> None:
    package = write(tmp_path / "p", checkpoint, signer, "uniform+lowrank:0.5+int8")
    assert package.manifest.recipe == "uniform+lowrank:0.5+int8"
    assert package.manifest.share_of_bytes < 0.25
    with torch.no_grad():
        assert package.load_model()(IDS).logits.isfinite().all()


def test_a_bridged_emulator_comes_back(tmp_path: Path, checkpoint: Checkpoint, signer: WorkerIdentity) -> None:
    package = write(tmp_path / "p", checkpoint, signer, "uniform+bridged")
    assert package.manifest.recipe == "uniform+bridged"
    assert open_package(package.folder, signer=signer.pin).load_emulator().bridges == (1,)
    loss = package.load_model()(IDS, labels=IDS).loss
    loss.backward()
    assert loss.isfinite()
    assert loss.item() != write(tmp_path / "q", checkpoint, signer).load_model()(IDS, labels=IDS).loss.item()


def some_bridge(package: Package) -> Bridge:
    bridge = Bridge(package.checkpoint.config.hidden_size, torch.device("cpu"))
    torch.nn.init.normal_(bridge.weight, std=0.1, generator=torch.Generator().manual_seed(0))
    torch.nn.init.ones_(bridge.bias)
    return bridge


@torch.no_grad()
def test_the_data_owners_bridge_acts_at_the_emulators_end_with_and_without_a_cache(folder: Path) -> None:
    package = open_package(folder)
    emulator, bridge = package.load_emulator(), some_bridge(package)
    hidden = torch.randn(1, 4, bridge.in_features, generator=torch.Generator().manual_seed(1))
    assert package.load_bridge() is None
    assert torch.equal(package.load_model().remote_layers.span(hidden), emulator(hidden))
    name = package.emulator_name
    package.save_bridge(bridge, {})
    span = package.load_model().remote_layers.span
    assert torch.equal(span(hidden), bridge(emulator(hidden)))
    torch.testing.assert_close(span.new_cache().extend(hidden, None, None), span(hidden))
    assert span.tensors().keys() == emulator.tensors().keys()
    assert package.emulator_name.startswith(f"{name}, bridge ")  # no run goes on with another emulator
    assert open_package(folder).id == package.id  # it lies beside the package, not in it
    moved = Path(shutil.copytree(folder, folder.with_name("elsewhere")))
    assert open_package(moved).load_bridge() is None
    package.bridge_file.parent.chmod(0o777)
    with pytest.raises(OwnershipError, match="cannot be trusted"):
        package.load_model()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"package": "f" * 64}, "is of the package ffffffffffffffff, not of"),
        ({"weight": torch.zeros(2, 2)}, "of another shape than the model's width"),
        ({"bias": torch.full((HIDDEN,), float("nan"))}, "not finite"),
        ({"more": torch.zeros(1)}, "of another shape"),
    ],
)
def test_a_bridge_that_is_not_the_packages_is_refused(folder: Path, changes: dict[str, Any], why: str) -> None:
    package = open_package(folder)
    package.save_bridge(some_bridge(package), {})
    names = {"package": package.id} | {name: each for name, each in changes.items() if isinstance(each, str)}
    tensors = {**load_file(package.bridge_file), **{k: v for k, v in changes.items() if isinstance(v, torch.Tensor)}}
    save_file(tensors, package.bridge_file, metadata=names)
    with pytest.raises(CheckpointError, match=why):
        package.load_model()
    package.bridge_file.write_bytes(b"no safetensors")
    with pytest.raises(CheckpointError, match="damaged"):
        package.load_model()


@pytest.mark.parametrize(
    "name",
    [
        "edge.safetensors",
        "emulator.safetensors",
        "emulator.json",
        "config.json",
        "tokenizer.json",
        "isthmus_parts.json",
    ],
)
def test_a_changed_byte_is_refused_and_the_file_named(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(bytes(data))
    with pytest.raises(PackageError, match=rf"{name}.*fetch the package again"):
        open_package(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    data = (folder / "emulator.safetensors").read_bytes()
    (folder / "emulator.safetensors").write_bytes(data[:-1])
    with pytest.raises(PackageError, match=r"emulator\.safetensors has \d+ bytes"):
        open_package(folder)


def test_a_missing_file_is_refused(folder: Path) -> None:
    (folder / "emulator.json").unlink()
    with pytest.raises(PackageError, match=r"lacks emulator\.json"):
        open_package(folder)


@pytest.mark.parametrize("name", [".gitkeep", "modeling_evil.py", "model.safetensors", "manifest.json.bak"])
def test_a_strange_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).touch()
    with pytest.raises(PackageError, match="does not belong"):
        open_package(folder)


def test_a_link_is_refused_even_to_the_same_bytes(folder: Path, original: Package) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(original.folder / "config.json")
    with pytest.raises(PackageError, match=r"config\.json is not a plain file"):
        open_package(folder)


def test_a_folder_in_the_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(PackageError, match="not a plain file"):
        open_package(folder)


def test_a_linked_manifest_is_refused(folder: Path, original: Package) -> None:
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").symlink_to(original.folder / "manifest.json")
    with pytest.raises(PackageError, match=r"manifest\.json"):
        open_package(folder)


def test_a_folder_without_a_manifest_is_no_package(tmp_path: Path) -> None:
    assert not is_package(tmp_path)
    with pytest.raises(PackageError, match="is not a package"):
        open_package(tmp_path)
    with pytest.raises(PackageError, match="is not a package"):
        open_package(tmp_path / "nowhere")


def test_another_signer_is_refused(folder: Path, signer: WorkerIdentity, tmp_path: Path) -> None:
    other = worker(tmp_path / "other")
    with pytest.raises(SignerError) as caught:
        open_package(folder, signer=other.pin)
    assert str(other.pin) in str(caught.value)
    assert str(signer.pin) in str(caught.value)


def test_an_unsigned_package_is_refused(folder: Path) -> None:
    outer = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({"payload": outer["payload"]}))
    with pytest.raises(SignerError, match="not signed"):
        open_package(folder)


def test_a_package_of_another_model_is_told_by_both_digests(original: Package, tmp_path: Path) -> None:
    other = Checkpoint(tiny_checkpoint("llama", tmp_path / "m", seed=1), "other")
    with pytest.raises(PackageError) as caught:
        check_package_fits(original.manifest, other)
    assert other.digest()[:16] in str(caught.value)
    assert original.digest[:16] in str(caught.value)


def test_a_package_of_this_model_fits(original: Package, checkpoint: Checkpoint) -> None:
    check_package_fits(original.manifest, checkpoint)  # does not raise
    assert original.digest == checkpoint.digest()


def test_signing_anew_takes_figures_and_leaves_the_weights(folder: Path, signer: WorkerIdentity) -> None:
    before = open_package(folder)
    after = sign_package(folder, signer, [row(before), row(before, task="sst2", plug_in_recovery=0.95)])
    assert [figures.task for figures in after.manifest.protection] == ["e2e", "sst2"]
    assert after.manifest.protection[0].plug_in_recovery == 0.75
    assert after.manifest.protection[0].thief_recovery == 0.25
    assert after.manifest.files == before.manifest.files
    assert after.id != before.id
    kept = sign_package(folder, signer)
    assert kept.manifest.protection == after.manifest.protection


def test_figures_of_another_emulator_change_nothing(folder: Path, signer: WorkerIdentity) -> None:
    before = open_package(folder)
    with pytest.raises(PackageError, match="none of the 1 rows"):
        sign_package(folder, signer, [row(before, emulator="00" * 32)])
    assert open_package(folder).id == before.id


def test_only_the_owner_signs_anew(folder: Path, tmp_path: Path) -> None:
    before = open_package(folder)
    with pytest.raises(SignerError):
        sign_package(folder, worker(tmp_path / "other"), [row(before)])
    assert open_package(folder).id == before.id


def test_what_cannot_be_signed_leaves_the_old_package(
    folder: Path, checkpoint: Checkpoint, signer: WorkerIdentity
) -> None:
    before = open_package(folder)
    with pytest.raises(ConfigError, match="licence"):
        write(folder, checkpoint, signer, licence="x" * 10_000)
    assert open_package(folder).id == before.id
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


def test_an_expired_certificate_signs_nothing(folder: Path, checkpoint: Checkpoint, signer: WorkerIdentity) -> None:
    before = open_package(folder)
    late = signer.certificate.not_after + 1
    with pytest.raises(FingerprintError, match="isthmus cloud keygen"):
        write(folder, checkpoint, signer, now=lambda: late)
    with pytest.raises(FingerprintError, match="isthmus cloud keygen"):
        sign_package(folder, signer, now=lambda: late)
    assert open_package(folder).id == before.id


def test_signing_anew_clears_what_a_crash_left(folder: Path, signer: WorkerIdentity) -> None:
    (folder / ".isthmus-tmp-manifest.json").write_text("{")
    with pytest.raises(PackageError):
        open_package(folder)
    assert sign_package(folder, signer).manifest.files == open_package(folder).manifest.files


def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, checkpoint: Checkpoint, signer: WorkerIdentity, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(packages, "sign", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "p", checkpoint, signer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "of_a_draft", [{}, {"kl_before": 2.0, "kl_after": 1.0, "agreement_before": 0.25, "agreement_after": 0.5}]
)
def test_how_it_was_distilled_is_said(
    tmp_path: Path, checkpoint: Checkpoint, signer: WorkerIdentity, of_a_draft: dict[str, float]
) -> None:
    distilled = {"steps": 10, "tokens": 640, "text": "ab" * 32, "error_before": 0.5, "error_after": 0.25, **of_a_draft}
    package = write(tmp_path / "p", checkpoint, signer, distilled=distilled)
    assert package.manifest.distilled is not None
    assert package.manifest.distilled.model_dump(exclude_none=True) == distilled


@pytest.mark.parametrize(("name", "says"), [(".", "no name of a folder"), ("..", "no name"), ("link", "is no package")])
def test_a_package_is_made_under_a_name_of_its_own(
    folder: Path, name: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "link").symlink_to(folder)
    with pytest.raises(ConfigError, match=says):
        check_free(Path(name))
