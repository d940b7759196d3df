"""Edges with sites at one cloud at a time, over real sockets: each ends where one process by itself would."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.cloud.sessions import eventually
from support.models.tiny import VOCAB, tiny_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from isthmus.cloud.engine.batching import MeasuredSpeed
from isthmus.cloud.engine.requests import Request, Share

EDGES = {"q and v": ["q_proj", "v_proj"], "all": "all-linear", "leased": ["q_proj", "v_proj"]}


def adapted(model: Any, name: str) -> Any:
    torch.manual_seed(len(name))
    config = peft.LoraConfig(r=4, target_modules=EDGES[name], task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config)


def train(model: Any, name: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two AdamW steps, and the trained parameters after them."""
    torch.set_num_threads(1)  # of this thread
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, foreach=False)
    losses = []
    for step in range(2):
        ids = torch.randint(3, VOCAB, (2, 6 + len(name)), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in trained.items()}


@pytest.mark.parametrize("batching", [True, False])
def test_edges_with_sites_at_once_equal_one_process_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batching: bool
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    # A tiny model takes less for a step than a busy machine lets an edge wait: this is time enough for one batch.
    monkeypatch.setattr(MeasuredSpeed, "seconds", lambda _self, _requests: 0.5)
    torch.set_num_threads(1)
    folder = tiny_checkpoint("llama", tmp_path / "model")
    cloud, home = served(folder, tmp_path / "parts"), Home(tmp_path)
    keys = [home.key_file, home.new_edge("bob"), home.new_edge("carol")]
    runs: dict[str, tuple[list[float], dict[str, Tensor]]] = {}
    with ThreadServer(cloud, home, batching=batching) as server, contextlib.ExitStack() as stack:
        models = {}
        for name, key in zip(EDGES, keys, strict=True):
            link = stack.enter_context(server.link(key))
            link.open(60)
            models[name] = adapted(link.load_model(leased=lambda _, name=name: name == "leased"), name)
            with torch.no_grad():  # the cloud binds the sites now: what waits below is a forward of each edge
                models[name](input_ids=torch.tensor([[3, 4]]))
        first = threading.Event()  # the compute thread has something else to do until all have asked
        compute = server.server._calls.engine
        compute.submit(Request("first", b"first", Share(), lambda: first.wait(120)))
        threads = [
            threading.Thread(target=lambda name=name, model=model: runs.update({name: train(model, name)}))
            for name, model in models.items()
        ]
        for thread in threads:
            thread.start()
        eventually(lambda: server.server.status()["waiting"] == dict.fromkeys(("alice", "bob", "carol"), 1), 60)
        first.set()
        for thread in threads:
            thread.join(120)
        status = server.server.status()
    assert (status["calls_per_meeting"] > 1) is batching
    assert (status["calls_per_pass"] > 1) is batching, compute.invariance
    for name in EDGES:
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        losses, trained = train(adapted(whole, name), name)
        assert runs[name][0] == losses
        assert not [each for each, value in runs[name][1].items() if not torch.equal(value, trained[each])]
