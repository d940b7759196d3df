"""`--device`: the edge's own layers on a GPU, and one clear line where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.models.tiny import tiny_checkpoint

from isthmus.common.errors import ConfigError
from isthmus.edge.client.link import connect
from isthmus.edge.process_setup import device_of

BOUND = 1e-4
"""Of the difference of losses and gradients between a GPU and the CPU, in fp32, over their size."""


def test_the_cpu_is_always_there() -> None:
    assert device_of("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda needs a GPU"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_of("cuda") == torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("codec", ["fp32", "int8"])
def test_an_edge_on_a_gpu_learns_what_one_on_the_cpu_does(tmp_path: Path, codec: str) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    home = Home(tmp_path / "home")
    ids = torch.arange(12).reshape(2, 6)
    found = []
    with ThreadServer(served(model, tmp_path / "parts"), home) as server:
        for device in ("cpu", "cuda"):
            address = f"isthmus://127.0.0.1:{server.port}#{home.pin}"
            with connect(address, key=home.key_file, codec=codec) as link:
                split = link.load_model().to(device_of(device))
                there = ids.to(split.device)
                loss = split(input_ids=there, labels=there, use_cache=False).loss
                loss.backward()
                gradients = [p.grad.cpu() for p in split.parameters() if p.grad is not None]
                assert gradients
                found.append((float(loss), torch.cat([each.flatten() for each in gradients])))
    (on_cpu, own), (on_gpu, other) = found
    assert abs(on_cpu - on_gpu) <= BOUND * on_cpu
    assert float((own - other).norm()) <= 100 * BOUND * float(own.norm())
