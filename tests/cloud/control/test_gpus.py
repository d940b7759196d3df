"""Workers on GPUs: each has one of its own, all of a group or none, and a span computes where it is."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.cloud.clouds import Home
from support.models.tiny import HIDDEN, N_LAYERS, tiny_checkpoint

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.runtime.site_host import SiteHost
from isthmus.backbone.split.span import SpanInput, load_span
from isthmus.cloud.control.ray_cluster import Gpus
from isthmus.cloud.control.serve_options import ServeOptions
from isthmus.cloud.control.supervisor import serve
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import served_by
from isthmus.cloud.engine.executor import BackwardCall, Executor
from isthmus.common.errors import ConfigError

KEYS = [(b"a", 1), (b"b", 1)]


@pytest.fixture(scope="module")
def two_gpus() -> Iterator[None]:
    """A Ray that says that this machine has two: it counts them, and looks at none."""
    import ray

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    counted = {"num_cpus": 0, "num_gpus": 2}
    ray.init(address="local", **counted, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()
    for number, handler in handlers.items():  # Ray has put its own in their place
        signal.signal(number, handler)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.long
def test_each_worker_has_a_gpu_of_its_own_and_all_of_a_group_or_none_has_one() -> None:
    import ray

    class Probe:  # a local one goes to Ray's workers as it is: they do not find this module
        def gpus(self) -> str:
            return os.environ["CUDA_VISIBLE_DEVICES"]

    gpus = Gpus()
    with pytest.raises(ConfigError, match=r"^3 workers on GPUs need one each, and Ray has 2 to give on this node"):
        gpus.reserve([0, 1, 2], seconds=1)
    gpus.reserve([0, 1])
    actors = [ray.remote(num_cpus=0, **gpus.options(number))(Probe).remote() for number in (0, 1)]
    assert sorted(ray.get([actor.gpus.remote() for actor in actors])) == ["0", "1"]
    assert gpus.options(2) == {}
    with pytest.raises(ConfigError, match="Ray has 0 to give"):
        gpus.reserve([2], seconds=1)
    for actor in actors:
        ray.kill(actor)
    gpus.release(0)
    assert ray.available_resources().get("GPU", 0) == 0, "the other of the group still has its own"
    gpus.release(1)
    gpus.reserve([2])
    assert gpus.options(2)["num_gpus"] == 1


def test_a_device_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match="unknown device 'tpu': choose one of cpu, cuda"):
        serve(ServeOptions(str(model), Home(tmp_path).folder, device="tpu"))


def test_a_worker_whose_torch_finds_no_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^--device cuda needs a GPU that torch finds"):
        served_by(WorkerSpec("", "tiny", "2:2", "fp32", "", "", "", 1, 1, 1, "", device="cuda"))


def _everything(folder: Path, family: str, device: str, *, masked: bool) -> list[torch.Tensor]:
    """What an executor gives for calls by themselves and together, with everything sent from the CPU."""
    span = load_span(tiny_checkpoint(family, folder), SplitPlan.parse("2:2", N_LAYERS)).to(device)
    executor = Executor(SiteHost(span), torch.float32, 1 << 30)
    mask = torch.ones(2, 12, dtype=torch.long) if masked else None
    generator = torch.Generator().manual_seed(0)
    given, gradient = (torch.randn(2, 12, HIDDEN, generator=generator) for _ in range(2))
    call = SpanInput(given, mask, torch.arange(12)[None] if masked else None)
    alone = [
        executor.forward(*KEYS[0], call, keep=False).hidden,
        executor.forward(*KEYS[0], call, keep=True).hidden,
        executor.backward(*KEYS[0], gradient).hidden,
        executor.backward(*KEYS[0], gradient, call).hidden,
    ]
    together = [each.hidden for each in executor.forward_together(dict.fromkeys(KEYS, call), keep=True)]
    executor.cache.evict_all()
    again = executor.backward_together([BackwardCall(key, gradient, call) for key in KEYS])
    found = [*alone, *together, *(each if isinstance(each, Exception) else each.hidden for each in again)]
    assert all(isinstance(each, torch.Tensor) for each in found)
    return [each for each in found if isinstance(each, torch.Tensor)]


def test_a_span_computes_where_it_is(tmp_path: Path) -> None:
    assert {each.device.type for each in _everything(tmp_path / "opt", "opt", "meta", masked=False)} == {"meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2"])
def test_a_gpu_computes_what_a_cpu_does(family: str, tmp_path: Path) -> None:
    cpu, gpu = (_everything(tmp_path / family, family, device, masked=True) for device in ("cpu", "cuda"))
    for ours, theirs in zip(gpu, cpu, strict=True):
        assert ours.device.type == "cuda"
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5)
