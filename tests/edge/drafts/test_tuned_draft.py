"""A tuned draft is used by itself, changes no text, and is read strictly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.emulator.packages import tiny_package
from support.models.local_cache import CachingLocalSpan
from support.models.sited_span import Sited
from support.models.tiny import PAD, VOCAB
from torch import Tensor

from isthmus.common.errors import CheckpointError, PackageError
from isthmus.edge.drafts import EmulatorDraft, FixedLength, drafting
from isthmus.edge.drafts.emulator_draft import around_emulator
from isthmus.edge.drafts.tuned_draft import TUNED_DRAFT, load_tuned, save_tuned, tuned_beside
from isthmus.emulator.compress.emulator_model import Emulator
from isthmus.emulator.package.package import Package

from ...backbone.conftest import Checkpoints, Pairs


@pytest.fixture(scope="module")
def package(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return tiny_package(tmp_path_factory.mktemp("tuned") / "package", checkpoints("llama"), plan="1:1")


def moved(package: Package) -> Emulator:
    emulator = package.load_emulator()
    with torch.no_grad():
        for weight in emulator.weights().values():
            weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)))
    return emulator


class LeasingSpan(Sited, CachingLocalSpan):
    """A span that takes leased adapters."""


def text(model: Any) -> Tensor:
    ids = torch.randint(3, VOCAB, (1, 12), generator=torch.Generator().manual_seed(7))
    found: Tensor = model.generate(ids, max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    return found


def test_the_weights_come_back_and_the_text_is_the_models(package: Package, pairs: Pairs, tmp_path: Path) -> None:
    path, emulator = tmp_path / TUNED_DRAFT, moved(package)
    save_tuned(path, emulator, package.id)
    edge = pairs("llama").edge
    expected = text(edge)
    for model in (edge, None):
        own = EmulatorDraft.open(package.folder, model, rule=FixedLength(3))
        tuned = EmulatorDraft.open(package.folder, model, rule=FixedLength(3), tuned=path)
        weights = tuned.model.remote_layers.span.weights()
        for name, weight in emulator.weights().items():
            assert torch.equal(weights[name], weight)
            assert not torch.equal(own.model.remote_layers.span.weights()[name], weight)
        with drafting(edge, tuned):
            assert torch.equal(text(edge), expected)
        assert tuned.statistics.drafted > 0


def test_it_lies_beside_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    assert tuned_beside(None) is tuned_beside(tmp_path / "run" / "adapter") is None
    (tmp_path / "run" / TUNED_DRAFT).write_bytes(b"")
    assert tuned_beside(tmp_path / "run" / "adapter") == tmp_path / "run" / TUNED_DRAFT
    monkeypatch.chdir(tmp_path / "run")
    assert tuned_beside(Path("adapter")) == tmp_path / "run" / TUNED_DRAFT


def test_a_draft_of_another_package_is_refused(package: Package, tmp_path: Path) -> None:
    save_tuned(tmp_path / TUNED_DRAFT, moved(package), "ab" * 32)
    with pytest.raises(
        PackageError, match=f"tuned from the package 'abababababababab', and this one is.*{package.id[:16]}"
    ):
        EmulatorDraft.open(package.folder, tuned=tmp_path / TUNED_DRAFT)


Change = Callable[[dict[str, Tensor]], object]


def _first(tensors: dict[str, Tensor], change: Callable[[Tensor], Tensor]) -> None:
    name = min(tensors)
    tensors[name] = change(tensors[name])


CHANGES: list[tuple[Change, str]] = [
    (lambda tensors: tensors.pop(min(tensors)), "lacks the tensor"),
    (lambda tensors: tensors.update(other=torch.zeros(1)), "strange tensor 'other'"),
    (lambda tensors: _first(tensors, lambda value: value[:-1].contiguous()), "is F32"),
    (lambda tensors: _first(tensors, lambda value: value.bfloat16()), "is BF16"),
    (lambda tensors: _first(tensors, lambda value: torch.full_like(value, float("nan"))), "not finite"),
    (lambda tensors: tensors.update(other=torch.zeros(1 << 20)), "more than the"),
]


@pytest.mark.parametrize(("change", "why"), CHANGES, ids=[why for _, why in CHANGES])
def test_a_file_that_does_not_fit_is_refused_and_changes_nothing(
    package: Package, tmp_path: Path, change: Change, why: str
) -> None:
    path = tmp_path / TUNED_DRAFT
    save_tuned(path, moved(package), package.id)
    load_tuned(path, package.load_emulator(), package.id)  # as it is, it fits
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    emulator, untouched = package.load_emulator(), package.load_emulator()
    with pytest.raises(CheckpointError, match=why):
        load_tuned(path, emulator, package.id)
    for name, weight in untouched.weights().items():
        assert torch.equal(emulator.weights()[name], weight)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, None])
def test_what_is_no_such_file_is_refused(package: Package, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / TUNED_DRAFT
    if content is None:
        shutil.copy(package.folder / "emulator.safetensors", path)
    else:
        path.write_bytes(content)
    for name in (path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError):
            load_tuned(name, package.load_emulator(), package.id)


def test_adapters_in_the_clouds_layers_are_not_in_the_draft(package: Package, pairs: Pairs) -> None:
    pair = pairs("llama")
    pair.edge.remote_layers.span = LeasingSpan(pair.span)
    model = peft.get_peft_model(pair.edge, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert list(pair.edge.find_sites())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(2))
    model.eval()
    expected = text(model)
    draft = EmulatorDraft.open(package.folder, model, rule=FixedLength(2))
    with drafting(model, draft):
        assert torch.equal(text(model), expected)
    assert draft.statistics.drafted > 0
    ids = torch.tensor([[5, 6, 7]])
    assert torch.isfinite(around_emulator(pair.edge, package.load_emulator())(ids, use_cache=False).logits).all()
