"""What `serve` and a worker do around the data plane, without Ray."""

from __future__ import annotations

import dataclasses
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.cloud.clouds import Home, served
from support.cloud.packages import tiny_package
from support.models.tiny import tiny_checkpoint

from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.plan import SplitPlan
from isthmus.cloud.control import supervisor as serve_module, worker as worker_module, worker_setup
from isthmus.cloud.control.autoscaler import Change
from isthmus.cloud.control.cluster import ControlStoreLostError, Serving
from isthmus.cloud.control.ports import Ports
from isthmus.cloud.control.supervisor import _bounds, _parts_folder, _wait
from isthmus.cloud.control.worker import Worker, WorkerSpec
from isthmus.cloud.control.worker_setup import EdgesFile, make_parts
from isthmus.common.errors import ConfigError, IsthmusError, PackageError, PortInUseError, SignerError, UnreachableError
from isthmus.emulator.package.package import Package
from isthmus.protocol.secure.keys import load_worker

SPEC = WorkerSpec("", "tiny", "2:2", "fp32", "", "", "127.0.0.1:0", 1, 1, 1, "")


class ActorError(Exception):
    """Stands for Ray's errors of dead actors."""


class DiedError(ActorError):
    """Stands for Ray's error of an actor that is gone for good."""


class TaskError(Exception):
    """Stands for Ray's error of a call that raised."""


def dead_serving() -> Serving:
    def get(_reference: Any, timeout: float | None = None) -> Any:
        raise DiedError("the actor died")

    serving = Serving.__new__(Serving)
    errors = SimpleNamespace(
        RayTaskError=TaskError, RayActorError=ActorError, ActorDiedError=DiedError, RayError=ActorError
    )
    wait = lambda references, timeout: ([each for each in references if each == "answered"], [])  # noqa: E731
    serving._ray = SimpleNamespace(get=get, wait=wait, exceptions=errors)  # type: ignore[assignment]  # for the module
    method = SimpleNamespace(remote=lambda *_: None)
    serving._workers = {0: SimpleNamespace(drain=method, port=method)}
    serving._starting, serving._ending = {}, {}
    serving._specs = [SPEC]
    return serving


class FakeActor:
    """An actor whose calls are answered at once, and noted."""

    def __init__(self, log: list[str], name: str, answers: dict[str, Any]) -> None:
        self.log, self.name, self.answers = log, name, answers

    def __getattr__(self, method: str) -> Any:
        def remote(*_: Any) -> Any:
            self.log.append(f"{self.name}.{method}")
            return self.answers.get(method)

        return SimpleNamespace(remote=remote)


def test_a_worker_is_started_and_drained_as_the_controller_says(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    serving = dead_serving()
    changes = [Change(1, start=True), None, Change(1, start=False), None]
    controller = FakeActor(log, "controller", {})
    controller.answers = {"change": changes}

    def get(reference: Any, timeout: float | None = None) -> Any:
        return changes.pop(0) if reference is changes else reference

    def start(number: int) -> FakeActor:
        return FakeActor(log, f"worker-{number}", {"port": 7444, "drain": True})

    monkeypatch.setattr(serving, "_start", start)
    serving._ray = SimpleNamespace(
        get=get,
        wait=lambda refs, timeout: (refs, []),
        kill=lambda actor: log.append(f"kill {actor.name}"),
        exceptions=serving._ray.exceptions,
    )  # type: ignore[assignment]  # stands for the module
    serving._workers, serving._controllers, serving._starting = {0: start(0)}, [controller], {}
    serving._grace, serving._specs = 1.0, [SPEC, SPEC]
    serving._gpus = SimpleNamespace(give_back=lambda number: log.append(f"gpu of {number}"))  # type: ignore[assignment]
    for _ in range(5):
        serving._scale()
        if not changes:
            break
    asked = ["controller.change"]
    assert log == [*asked, "worker-1.port", *asked, *asked, "worker-1.drain", "kill worker-1", "gpu of 1", *asked]
    assert list(serving._workers) == [0]


def test_a_worker_that_dies_while_it_loads_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    serving = dead_serving()

    def get(reference: Any, timeout: float | None = None) -> Any:
        if reference == "lost":
            raise ActorError("the actor is restarting")
        return reference

    monkeypatch.setattr(serving._ray, "get", get)
    monkeypatch.setattr(serving._ray, "wait", lambda refs, timeout: (refs, []), raising=False)
    first, later = FakeActor(log, "worker-0", {}), FakeActor(log, "worker-1", {"port": "answer"})
    controller = FakeActor(log, "controller", {})
    serving._workers, serving._controllers, serving._starting = {0: first, 1: later}, [controller], {1: "lost"}
    serving._scale()
    assert (serving._starting, log) == ({1: "answer"}, ["worker-1.port"])
    serving._scale()
    assert (serving._starting, log[1:]) == ({}, ["controller.change"])
    assert serving._workers == {0: first, 1: later}


def test_a_worker_that_still_loads_is_neither_asked_nor_drained() -> None:
    serving = dead_serving()
    serving._starting = {0: "answer"}
    assert not serving.is_dead()
    assert serving.drain(1.0) is True


def test_a_worker_that_has_loaded_is_drained_before_anybody_has_looked() -> None:
    serving = dead_serving()
    serving._starting = {0: "answered"}
    assert serving.drain(1.0) is False  # it was asked, and its death is a call unanswered


def test_a_worker_that_cannot_start_for_an_unknown_reason_is_no_mistake_of_the_configuration() -> None:
    with pytest.raises(IsthmusError, match="the actor died") as failure:
        dead_serving()._get("answer")
    assert failure.value.exit_code == 1


def test_a_machine_on_which_ray_finds_no_gpu_is_told_before_workers_are_started() -> None:
    serving = dead_serving()
    serving._ray.init = lambda **_: None
    serving._ray.get_runtime_context = lambda: SimpleNamespace(gcs_address="127.0.0.1:1")
    serving._ray.cluster_resources = lambda: {"memory": 1.0}
    serving._specs, serving._address, serving._least = [dataclasses.replace(SPEC, device="cuda")], None, 1
    serving._ray_folder = Path("ray")
    with pytest.raises(ConfigError, match=r"^--device cuda needs a GPU that torch finds, and it finds none"):
        serving._begin()


def test_a_control_store_that_is_gone_is_told_after_a_few_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = dead_serving()
    serving._silent, serving._address, serving._least, serving._specs = 0, None, 1, [SPEC]
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        store.listen()
        serving._control = store.getsockname()
        for _ in range(5):
            serving.tend()
    serving.tend()
    serving.tend()
    with pytest.raises(ControlStoreLostError):
        serving.tend()
    serving._address = "ray://elsewhere"
    with pytest.raises(UnreachableError, match="elsewhere"):
        serving.restart()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline": 3}, "2 layers, so it has 1 to 2 stages"),
        ({"pipeline": 2, "workers": "2"}, "--pipeline 2 and --workers 2 exclude each other"),
        ({"pipeline": 2, "emulator": Path("package")}, "--pipeline 2 and --emulator exclude each other"),
    ],
)
def test_a_pipeline_that_does_not_fit_is_refused(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve_module, "Serving", lambda *_, **__: pytest.fail("Ray was started"))
    model = tiny_checkpoint("llama", tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        serve_module.serve(str(model), home=Home(tmp_path).folder, listen="127.0.0.1:0", **arguments)


class StartedError(Exception):
    """Instead of starting Ray."""


@pytest.mark.parametrize(
    ("options", "threads", "line"),
    [
        ({}, [8], "the worker computes with 8 threads; this process may use 8 cores"),
        ({"workers": "1:4"}, [2] * 4, "each of at most 4 workers has 2 threads; this process may use 8 cores"),
        ({"workers": "3"}, [2] * 3, "each of at most 3 workers has 2 threads; this process may use 8 cores"),
        ({"pipeline": 2}, [4] * 2, "each of at most 2 workers has 4 threads; this process may use 8 cores"),
        (
            {"workers": "1:9"},
            [1] * 9,
            "9 workers has 1 thread; this process may use 8 cores, so they will",
        ),
        ({"workers": "2", "threads": 8}, [8] * 2, "has 8 threads; this process may use 8 cores, so they will wait"),
    ],
)
def test_workers_share_the_cores_at_their_largest_number_and_the_operator_is_told(
    options: dict[str, Any], threads: list[int], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    started: list[WorkerSpec] = []

    def start(specs: list[WorkerSpec], *_: Any, **__: Any) -> None:
        started.extend(specs)
        raise StartedError

    monkeypatch.setattr(serve_module, "Serving", start)
    monkeypatch.setattr(serve_module, "usable_cores", lambda: 8)
    home, model = Home(tmp_path).folder, tiny_checkpoint("llama", tmp_path / "model")
    with pytest.raises(StartedError):
        serve_module.serve(str(model), home=home, listen="127.0.0.1:0", **options)
    assert [spec.threads for spec in started] == threads
    assert line in " ".join(capsys.readouterr().err.split())
    logs = [Path(spec.log_file).name for spec in started]
    assert logs == ["worker.log", *(f"worker-{number}.log" for number in range(1, len(started)))]
    assert not (home / "pipeline").exists()


def test_a_worker_that_is_dead_at_the_drain_is_no_error() -> None:
    assert dead_serving().drain(1.0) is False


def test_a_worker_that_is_stuck_is_not_waited_for_at_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    serving = dead_serving()

    def get(_reference: Any, timeout: float | None = None) -> Any:
        assert timeout is not None
        assert timeout > 1.0  # a drain that takes all of its grace is answered
        raise TimeoutError

    monkeypatch.setattr(serving._ray, "get", get)
    assert serving.drain(1.0) is False


def test_serve_ends_when_the_worker_is_gone_for_good() -> None:
    with pytest.raises(UnreachableError, match=r"worker\.log"):
        _wait(threading.Event(), dead_serving().is_dead, poll=0.001)


def test_serve_goes_on_while_the_worker_is_restarted() -> None:
    stop, answers = threading.Event(), [True, True, False, True, True, False]

    def is_dead() -> bool:
        if len(answers) == 1:
            stop.set()
        return answers.pop(0)

    _wait(stop, is_dead, poll=0.001)
    assert not answers


@pytest.mark.parametrize("listen", ["127.0.0.1:99999", "127.0.0.1:65536", "127.0.0.1:9999999999999999999999", "h:²"])
def test_a_port_that_is_none_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="address to listen on"):
        Ports().take(listen)


def test_ports_are_kept_until_their_workers_listen() -> None:
    ports = Ports()
    try:
        first, second = ports.take_several("127.0.0.1:0", 2)
        assert first != second
        host, _, port = first.rpartition(":")
        with socket.socket() as worker:  # as gRPC binds it
            worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            worker.bind((host, int(port)))
            worker.listen()
            with pytest.raises(PortInUseError, match=first):
                Ports().take(first)
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind((host, int(port)))
    finally:
        ports.close()
    start = int(port)
    given = Ports()
    try:
        assert given.take(f"127.0.0.1:{start}") == f"127.0.0.1:{start}"
    finally:
        given.close()


@pytest.mark.parametrize(("workers", "bounds"), [("1", (1, 1)), ("3", (3, 3)), ("1:4", (1, 4)), ("2:2", (2, 2))])
def test_a_number_of_workers_is_one_or_two_numbers(workers: str, bounds: tuple[int, int]) -> None:
    assert _bounds(workers) == bounds


@pytest.mark.parametrize("workers", ["0", "4:2", "1:2:3", "two", "-1", "1:", "129"])
def test_a_number_of_workers_that_is_none_is_refused(workers: str) -> None:
    with pytest.raises(ConfigError, match=r"MIN:MAX"):
        _bounds(workers)


def test_a_changed_tokenizer_makes_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    model = tiny_checkpoint("llama", tmp_path / "model")
    checkpoint = Checkpoint(model, "tiny")
    plan = SplitPlan.parse("2:2", checkpoint.config.num_hidden_layers)
    first = _parts_folder(checkpoint, plan)
    assert _parts_folder(checkpoint, plan) == first
    (model / "chat_template.jinja").write_text("{{ messages }}")
    second = _parts_folder(checkpoint, plan)
    assert second != first
    make_parts(checkpoint, plan, second)
    assert not first.exists()
    assert (second / "chat_template.jinja").read_text() == "{{ messages }}"


def test_two_workers_make_the_parts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint(tiny_checkpoint("llama", tmp_path / "model"), "tiny")
    plan = SplitPlan.parse("2:2", checkpoint.config.num_hidden_layers)
    exports = []
    both = threading.Event()

    def export(_checkpoint: Checkpoint, _plan: SplitPlan, folder: Path) -> None:
        exports.append(folder)
        both.wait(0.2)
        folder.mkdir()

    monkeypatch.setattr(worker_setup, "export_edge_parts", export)
    arguments = (checkpoint, plan, tmp_path / "parts")
    threads = [threading.Thread(target=make_parts, args=arguments) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(exports) == 1


def test_a_malformed_edges_file_is_told_at_the_start(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with (home.folder / "authorized_edges").open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(ConfigError, match="line 2"):
        EdgesFile(home.folder)
    with pytest.raises(ConfigError, match="line 2"):
        serve_module.serve(str(tmp_path), home=home.folder)


# A package on offer ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, keys: Home) -> Package:
    folder = tmp_path_factory.mktemp("package")
    return tiny_package(folder / "package", tiny_checkpoint("llama", folder / "model"), signer=load_worker(keys.folder))


def serving(package: Package, keys: Home, **changes: Any) -> None:
    """Call `serve` up to the point where it has looked at everything."""
    options = {"home": keys.folder, "edge_layers": "2:2", "listen": "127.0.0.1:0", "emulator": package.folder}
    serve_module.serve(changes.pop("model", str(package.folder.parent / "model")), **{**options, **changes})


def test_a_package_is_looked_at_before_anything_is_started(
    package: Package, keys: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(serve_module, "Serving", lambda *_, **__: pytest.fail("Ray was started"))
    with pytest.raises(PackageError, match=r"split plan 2:2, but --edge-layers is 1:2"):
        serving(package, keys, edge_layers="1:2")
    other = tiny_checkpoint("llama", tmp_path / "other", seed=3)
    with pytest.raises(PackageError, match=package.digest[:16]):
        serving(package, keys, model=str(other))
    with pytest.raises(SignerError, match="SHA256:"):
        serving(package, Home(tmp_path / "strangers"))
    damaged = shutil.copytree(package.folder, tmp_path / "damaged")
    (damaged / "emulator.json").write_text("{}")
    with pytest.raises(PackageError, match=r"emulator\.json"):
        serving(package, keys, emulator=damaged)


def test_a_worker_offers_the_package_and_looks_at_it_again(package: Package, keys: Home, tmp_path: Path) -> None:
    model, parts = package.folder.parent / "model", tmp_path / "parts"
    offered = served(model, parts, home=keys.folder, emulator=package.folder).package
    assert offered is not None
    assert {entry.name for entry in offered.listing().entries} == {file.name for file in package.folder.iterdir()}
    assert served(model, parts, home=keys.folder).package is None
    damaged = shutil.copytree(package.folder, tmp_path / "damaged")
    (damaged / "emulator.json").write_text("{}")
    with pytest.raises(PackageError, match=r"emulator\.json"):
        served(model, parts, home=keys.folder, emulator=damaged)


def test_a_restarted_worker_that_cannot_start_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PortInUseError("taken")

    monkeypatch.setattr(Worker, "_start", fail)
    monkeypatch.setattr(worker_module, "RESTART_PAUSE", 0.0)
    with pytest.raises(PortInUseError, match="taken"):
        Worker(SPEC).port()  # a first start tells whoever started it
    monkeypatch.setattr(worker_module, "_restarted", lambda: True)
    codes: list[int] = []
    monkeypatch.setattr(worker_module.os, "_exit", codes.append)
    Worker(SPEC)
    assert codes == [1]


@pytest.mark.parametrize("module", ["controller", "worker", "cluster", "supervisor"])
def test_a_process_that_only_has_handles_of_workers_needs_no_torch(module: str) -> None:
    asked = f"import sys, isthmus.cloud.control.{module}; print({{'torch', 'transformers', 'grpc'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
