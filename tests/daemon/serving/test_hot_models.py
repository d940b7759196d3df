"""Models in memory: which weights they share, and that no adapter changes another's or the base model's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import ThreadServer

from isthmus.backbone.adapters.adapter_files import save_adapter
from isthmus.common.errors import CheckpointError, UnknownModelError
from isthmus.daemon.serving.hot_models import HotModels, sharing_copy

IDS = torch.tensor([[5, 9, 70, 33]])
EDGE: dict[str, Any] = {"layers_to_transform": [0, 5]}

Write = Callable[[Any, Path], None]


def with_peft(kind: type[Any], **options: Any) -> Write:
    def write(model: Any, folder: Path) -> None:
        torch.manual_seed(1)
        adapted = peft.get_peft_model(model, kind(task_type="CAUSAL_LM", **options))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.5 * torch.randn_like(parameter))
                elif options.get("bias") == "lora_only" and name.endswith("bias"):
                    parameter.add_(1.0)
        save_adapter(adapted, folder)

    return write


def a_layer(model: Any, folder: Path) -> None:
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder)


ADAPTERS: dict[str, tuple[Write, bool]] = {
    "lora": (with_peft(peft.LoraConfig, **EDGE, target_modules=["q_proj"]), True),
    "dora": (with_peft(peft.LoraConfig, **EDGE, target_modules=["q_proj"], use_dora=True), True),
    "ia3": (with_peft(peft.IA3Config, target_modules=r".*\.[05]\..*\.k_proj", feedforward_modules=[]), True),
    "lora with biases": (with_peft(peft.LoraConfig, **EDGE, target_modules=["q_proj"], bias="lora_only"), False),
    "a layer": (a_layer, False),
}


@pytest.fixture
def fresh(server: ThreadServer) -> Iterator[Callable[[], Any]]:
    """Loads the edge's part of the model."""
    with server.link() as link:
        link.open(5)
        yield link.load_model


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_changes_nothing_but_its_own_model(fresh: Callable[[], Any], tmp_path: Path, name: str) -> None:
    write, shares = ADAPTERS[name]
    write(fresh(), tmp_path / "adapter")
    base, untouched = fresh(), fresh()
    before = {key: value.clone() for key, value in base.state_dict().items()}
    hot = HotModels(2)
    with hot.lend("a", lambda: base, None) as plain, hot.lend("a", lambda: base, tmp_path / "adapter") as model:
        assert torch.equal(output(plain), output(untouched))
        adapted = output(model)
        assert not torch.equal(adapted, output(plain))
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        assert (inner.lm_head.weight is base.lm_head.weight) == shares
        with hot.lend("a", lambda: base, tmp_path / "adapter") as other:  # at the same time
            assert other is not model
            assert torch.equal(output(other), adapted)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_a_model_is_used_again(fresh: Callable[[], Any]) -> None:
    hot, base = HotModels(1), fresh()
    with hot.lend("a", lambda: base, None) as first:
        pass
    with hot.lend("a", lambda: base, None) as again:
        assert again is first
    with hot.lend("b", fresh, None) as other:
        assert other.lm_head.weight is not first.lm_head.weight
    with pytest.raises(UnknownModelError), hot.lend("a", lambda: base, Path("/nowhere/at/all")):
        pass


def test_a_hot_model_does_not_wait_for_one_that_is_loaded() -> None:
    hot, base = HotModels(2), torch.nn.Linear(2, 2)
    begun, ends = threading.Event(), threading.Event()
    loads: list[int] = []
    used: list[Any] = []

    def slow() -> Any:
        loads.append(1)
        begun.set()
        assert ends.wait(20)
        return torch.nn.Linear(2, 2)

    def use(key: str, load: Callable[[], Any]) -> None:
        with hot.lend(key, load, None) as model:
            used.append((key, model))

    with hot.lend("hot", lambda: base, None):
        pass
    cold = [threading.Thread(target=use, args=("cold", slow)) for _ in range(2)]
    for thread in cold:
        thread.start()
    assert begun.wait(20)
    other = threading.Thread(target=use, args=("hot", slow))
    other.start()
    other.join(20)
    assert [key for key, _ in used] == ["hot"]
    ends.set()
    for thread in cold:
        thread.join(20)
    assert [key for key, _ in used] == ["hot", "cold", "cold"]
    assert len(loads) == 1


def test_one_that_cannot_be_loaded_is_not_kept() -> None:
    hot = HotModels(2)

    def fail() -> Any:
        raise CheckpointError("damaged")

    with pytest.raises(CheckpointError), hot.lend("a", fail, None):
        pass
    with hot.lend("a", lambda: torch.nn.Linear(2, 2), None) as model:
        assert model is not None


def test_copies_have_their_own_spans(fresh: Callable[[], Any]) -> None:
    base = fresh()
    copied = sharing_copy(base)
    copied.remote_layers.span = lambda hidden, mask, positions: hidden
    assert not torch.equal(output(copied), output(base))
    assert all(p is q for p, q in zip(copied.parameters(), base.parameters(), strict=True))
