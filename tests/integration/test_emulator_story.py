"""The emulator path as its two parties live it: by commands, over the session and from files alone; and its mishaps."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.cloud.clouds import Home, ThreadServer, served
from support.commands import Shell, ended, in_process, refused, skip_without_namespaces, wait_for
from support.emulator.packages import tiny_package, tuned
from support.models.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM

from isthmus.backbone.checkpoints.built_in import BUILT_IN
from isthmus.backbone.checkpoints.sources import Checkpoint
from isthmus.backbone.split.span import load_span
from isthmus.emulator.package.package import Package, open_package
from isthmus.emulator.package.plug_in import plug_in
from isthmus.experiments.harness.launch import LocalCloud, working_folder
from isthmus.experiments.harness.tickets import Ticket, write_tickets
from isthmus.experiments.rigs.network.relay import Relay
from isthmus.protocol.enrolment import ConnectionString, Quota
from isthmus.protocol.messages import MAX_FILE_CHUNK
from isthmus.protocol.secure.keys import load_worker

IDS = torch.tensor([[5, 9, 33, 120, 7, 2]])
WEIGHTS = "adapter_model.safetensors"


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder that is being written; 0 where there is none yet."""
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # it was renamed just now
            size += path.stat().st_size
    return size


def write_short_tickets(path: Path) -> None:
    """Examples for a tiny model, whose tokens are bytes."""
    write_tickets(path, [Ticket(f"Ticket {n}: card {n % 5} lost.", f" triage {n % 3}") for n in range(12)])


def write_texts(path: Path, texts: Iterable[str]) -> None:
    """Public texts, one a line."""
    path.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))


# The way it should go -------------------------------------------------------------------------------------------------


@pytest.fixture
def roomy() -> Iterator[Path]:
    """A folder that is gone after the test: a package, an adapter and a checkpoint of a real model take gigabytes."""
    with working_folder() as folder:
        yield folder


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.server
def test_from_the_build_to_the_second_stage_over_the_session(real_model: Checkpoint, roomy: Path) -> None:
    skip_without_namespaces()
    owner, edge = Shell(roomy / "owner"), Shell(roomy / "edge")
    text, label = "Ticket {}: the card of customer {} was charged twice.\nTriage:", " [high] billing / duplicate"
    tickets = [Ticket(text.format(n, 71 * n % 100), label) for n in range(40)]
    write_tickets(edge.folder / "tickets.jsonl", tickets[:28])
    write_tickets(edge.folder / "held-out.jsonl", tickets[36:])
    offer = ("--edge-layers", "2:2", "--emulator", str(owner.folder / "package"), "--threads", "2")
    cloud = LocalCloud(roomy / "keys", BUILT_IN, *offer)
    here = ("--cloud", cloud.connection_file, "--key", cloud.edge_key)
    how = ("--batch", 4, "--threads", 1)
    scored = ("edge", "eval", *here, *how, "--data", "held-out.jsonl")

    build = ("build", "--adapter-layers", "2:2", "--method", "uniform", "--keep", "0.5", "--licence", "tuning only")
    built = owner.json("emulator", *build, "--model", BUILT_IN, "--home", cloud.home, "--out", "package")
    assert built["share_of_parameters"] == 0.5
    with cloud:
        # A fetch that is killed leaves no package, and goes on when it is repeated.
        fetch = ("emulator", "fetch", *here, "--out", "package")
        fetching = edge.start(*fetch)
        wait_for(lambda: size_of(edge.folder / "package.part") > 2 * MAX_FILE_CHUNK, fetching)
        assert ended(fetching, signal.SIGKILL).returncode == -signal.SIGKILL
        held = size_of(edge.folder / "package.part")
        assert not (edge.folder / "package").exists()
        fetched = edge.json(*fetch)
        assert (fetched["id"], fetched["plan"]) == (built["id"], "2:2")
        package = edge.folder / "package"
        assert 0 < fetched["bytes_down"] < size_of(package) - held + MAX_FILE_CHUNK // 8

        # The edge's own bridge, from public texts that share nothing with the private ones.
        public = [f"Order {n}: {n % 7} items were sent to town {n % 5}, and none came back." for n in range(120)]
        write_texts(edge.folder / "public.jsonl", public)
        sends = ("--text", "public.jsonl", "--data", "tickets.jsonl", "--block", 64)
        fitted = edge.json("emulator", "fit", *here, "--package", "package", *sends)
        assert fitted["kl_after"] < fitted["kl_before"]
        assert Path(fitted["bridge"]).exists()

        # Tuning, with the cloud in reach from here and out of reach from there.
        port = int(ConnectionString.parse(cloud.connection).address.rpartition(":")[2])
        socket.create_connection(("127.0.0.1", port), 5).close()
        data = ("--data", "tickets.jsonl", "--validation", "held-out.jsonl")
        tune = ("emulator", "tune", "--package", "package", *data, "--steps", 12, "--learning-rate", 2e-3, "--json")
        with edge.start(*scored, "--json") as scoring:  # meanwhile
            report = json.loads(edge.offline(port, *tune, "--method", "full", *how, "--out", "run"))
            untuned = json.loads(ended(scoring).stdout)["loss"]
        assert report["loss_after"] < report["loss_before"]

        assert "plugged in: full" in edge.json("emulator", "return", *here, "--adapter", "run/adapter")["message"]
        plugged = edge.json(*scored, "--plugged")["loss"]
        assert plugged == edge.json(*scored, "--adapter", "run/adapter")["loss"]
        assert plugged < 0.75 * untuned

    with cloud:  # once more: what was plugged in outlives the process
        prompt = tickets[-1].prompt
        answer = edge.json("edge", "generate", *here, "--plugged", "--max-new-tokens", 4, prompt)["text"]
        opened = open_package(package)
        model = plug_in(
            edge.folder / "run" / "adapter", opened.checkpoint, opened.plan, load_span(real_model, opened.plan)
        )
        inputs = opened.load_tokenizer()(prompt, return_tensors="pt")
        wanted = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answer == opened.load_tokenizer().decode(wanted, skip_special_tokens=True) != ""

        cloud.enroll("stranger", roomy / "stranger")
        other = ("--cloud", cloud.connection_file, "--key", roomy / "stranger")
        refused(edge.run("edge", "generate", *other, "--plugged", prompt), 42, "no adapter")

        went_on = edge.json(
            "edge", "train", *here, *data, "--method", "full", *how, "--plugged", "--steps", 2, "--out", "second"
        )
        assert went_on["loss_before"] == plugged


def test_from_files_alone(owner: Owner, tmp_path: Path) -> None:
    package, out = owner.shell.folder / "package", tmp_path / "plugged"
    edge = Shell(tmp_path / "edge")
    shutil.copytree(package, edge.folder / "package")
    write_short_tickets(edge.folder / "tickets.jsonl")
    assert edge.json("emulator", "verify", "--package", "package", "--signer", owner.pin)["plan"] == "2:2"
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 5).close()
        signed = ("--package", "package", "--signer", owner.pin)
        how = ("--steps", 4, "--batch", 4, "--learning-rate", 1e-2, "--threads", 1)
        edge.offline(port, "emulator", "tune", *signed, "--data", "tickets.jsonl", *how, "--out", "run")
    adapter = Path(shutil.copytree(edge.folder / "run" / "adapter", tmp_path / "adapter"))

    plug = ("plug", "--model", owner.model, "--package", package, "--adapter", adapter, "--out", out)
    assert owner.shell.json("emulator", *plug)["kind"] == "model"
    opened = open_package(package)
    split = plug_in(adapter, opened.checkpoint, opened.plan, load_span(Checkpoint(owner.model, "tiny"), opened.plan))
    exported, before = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, owner.model))
    with torch.no_grad():
        torch.testing.assert_close(
            exported(IDS).logits, split(IDS).logits, rtol=0, atol=1e-5
        )  # merged: rounded once more
        assert (exported(IDS).logits - before(IDS).logits).abs().max() > 1e-2


# A tiny model, for all that does not depend on what a model knows -----------------------------------------------------


class Owner:
    """A tiny model, the keys of its owner, and a package that the command has built."""

    def __init__(self, folder: Path) -> None:
        self.shell = Shell(folder)
        self.model = tiny_checkpoint("llama", folder / "tiny")
        self.home = Home(folder / "keys")
        self.pin = str(self.home.pin)
        self.shell.good(*self.build("package"))

    def build(self, out: object, *more: object) -> tuple[object, ...]:
        """The command that builds a package."""
        where = ("--model", self.model, "--home", self.home.folder, "--out", out, "--device", "cpu")
        return ("emulator", "build", *where, "--licence", "for tests", *more)


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return Owner(tmp_path_factory.mktemp("owner"))


@pytest.fixture(scope="module")
def package(owner: Owner) -> Package:
    return open_package(owner.shell.folder / "package")


@pytest.fixture(scope="module")
def adapter(package: Package, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tuned(package, tmp_path_factory.mktemp("tuned") / "adapter")


@pytest.fixture(scope="module")
def server(owner: Owner, package: Package, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    parts = tmp_path_factory.mktemp("cloud") / "parts"
    with ThreadServer(served(owner.model, parts, home=owner.home.folder, emulator=package.folder), owner.home) as cloud:
        yield cloud


def with_nan(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name][0, 0] = float("nan")


def of_another_shape(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name][:, :-1].contiguous()


def spoiled(adapter: Path, out: Path, spoil: Callable[[dict[str, torch.Tensor], str], None]) -> tuple[Path, str]:
    """A copy of an adapter with one bad tensor, and the tensor's name."""
    shutil.copytree(adapter, out)
    weights = load_file(out / WEIGHTS)
    name = sorted(weights)[1]
    spoil(weights, name)
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})
    return out, name


# The mishaps ----------------------------------------------------------------------------------------------------------


def test_a_package_of_another_model_is_neither_served_nor_plugged_into(
    owner: Owner, package: Package, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_checkpoint("llama", tmp_path / "other", seed=9)
    before = sorted(owner.home.folder.iterdir())
    serve = ("--home", owner.home.folder, "--listen", "127.0.0.1:0", "--metrics", "", "--connection-file")
    done = in_process(capsys, "cloud", "serve", "--model", other, "--emulator", package.folder, *serve, tmp_path / "c")
    refused(done, 25, package.digest[:16])
    assert not (tmp_path / "c").exists()
    assert sorted(set(owner.home.folder.iterdir()) - {owner.home.folder / "serve.lock"}) == before
    plug = ("--package", package.folder, "--adapter", adapter, "--out", tmp_path / "plugged")
    refused(in_process(capsys, "emulator", "plug", "--model", other, *plug), 25, package.digest[:16])
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_nothing_is_tuned_on_a_changed_package_or_a_strangers(
    package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_short_tickets(tmp_path / "tickets.jsonl")
    changed = Path(shutil.copytree(package.folder, tmp_path / "changed"))
    data = bytearray((changed / "emulator.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "emulator.safetensors").write_bytes(data)
    tune = ("emulator", "tune", "--data", tmp_path / "tickets.jsonl", "--steps", 1, "--out", tmp_path / "run")
    refused(in_process(capsys, *tune, "--package", changed), 25, "emulator.safetensors")
    stranger = f"SHA256:{'A' * 43}"
    done = in_process(capsys, *tune, "--package", package.folder, "--signer", stranger)
    refused(done, 26, stranger, str(package.signer))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed", "tickets.jsonl"]


@pytest.mark.server
@pytest.mark.parametrize("spoil", [with_nan, of_another_shape])
def test_a_bad_adapter_is_refused_over_the_session_and_the_old_one_stays(
    server: ThreadServer,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, torch.Tensor], str], None],
) -> None:
    give = ("emulator", "return", "--cloud", server.address, "--key", server.home.key_file, "--adapter")
    assert in_process(capsys, *give, adapter).returncode == 0
    root = server.home.folder / "adapters"
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert any(path.name == WEIGHTS for path in before)
    bad, name = spoiled(adapter, tmp_path / "bad", spoil)
    refused(in_process(capsys, *give, bad), 42, name)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("spoil", [with_nan, of_another_shape])
def test_a_bad_adapter_is_not_plugged_in_from_files(
    owner: Owner,
    package: Package,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[dict[str, torch.Tensor], str], None],
) -> None:
    bad, name = spoiled(adapter, tmp_path / "bad", spoil)
    plug = ("--model", owner.model, "--package", package.folder, "--adapter", bad, "--out", tmp_path / "plugged")
    refused(in_process(capsys, "emulator", "plug", *plug), 27, name)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_share_that_leaves_no_layer(owner: Owner, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(in_process(capsys, *owner.build(tmp_path / "p", "--keep", "0.01")), 22, "keep 0.01", "leaves none")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.long
def test_a_distillation_that_is_killed_and_stopped_ends_in_the_same_bytes(owner: Owner, tmp_path: Path) -> None:
    (tmp_path / "public.txt").write_text("".join(f"The {i}th of the lines counts {i * i} things.\n" for i in range(60)))
    shell = Shell(tmp_path)
    how = ("--distill", "public.txt", "--distill-steps", 200, "--batch", 4, "--length", 64, "--save-every", 10)
    undisturbed, disturbed = owner.build("undisturbed", *how), owner.build("disturbed", *how)
    state = tmp_path / "disturbed.distill"

    def saved() -> int:
        return max((int(path.name.rpartition("-")[2]) for path in state.glob("checkpoint-*")), default=0)

    with shell.start(*undisturbed) as whole:
        first = shell.start(*disturbed)
        wait_for(lambda: saved() > 0, first)
        assert ended(first, signal.SIGKILL).returncode == -signal.SIGKILL
        reached = saved()
        second = shell.start(*disturbed)
        wait_for(lambda: saved() > reached, second)
        stopped = ended(second, signal.SIGINT)
        assert stopped.returncode == 130, stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert "repeat the command to go on" in stopped.stderr.splitlines()[-1]
        assert not (tmp_path / "disturbed").exists()
        reached = saved()
        last = shell.run(*disturbed)
        assert f"Resumed after step {reached} of 200" in last.stderr
        assert last.returncode == 0, last.stderr
        assert ended(whole).returncode == 0
    assert not state.exists()
    emulators = [tmp_path / name / "emulator.safetensors" for name in ("undisturbed", "disturbed")]
    assert emulators[0].read_bytes() == emulators[1].read_bytes()


@pytest.mark.server
def test_a_fit_ends_at_its_allowance_and_goes_on_when_there_is_more(
    owner: Owner, package: Package, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key = owner.home.new_edge("limited", quota=Quota(max_tokens=3000))
    letters = torch.randint(97, 123, (100, 60), generator=torch.Generator().manual_seed(0)).tolist()
    write_texts(tmp_path / "public.jsonl", (bytes(each).decode() for each in letters))
    copy = shutil.copytree(package.folder, tmp_path / "package")
    sends = ("--text", tmp_path / "public.jsonl", "--data", "none", "--block", 64, "--tokens", 4096, "--json")
    fit = ("emulator", "fit", "--package", copy, *sends, "--key", key, "--cloud")
    cloud = served(owner.model, tmp_path / "parts", home=owner.home.folder, emulator=package.folder)
    with ThreadServer(cloud, owner.home) as server:
        done = in_process(capsys, *fit, server.address)
        refused(done, 42, "limited may have 3000 tokens", "952 are left")
    tenants = owner.home.folder / "authorized_edges"
    tenants.write_text(tenants.read_text().replace("max-tokens=3000", "max-tokens=4096"))
    with ThreadServer(cloud, owner.home) as server:
        done = in_process(capsys, *fit, server.address)
        assert done.returncode == 0, done.stderr
        fitted = json.loads(done.stdout)
        assert (fitted["tokens"], fitted["asked"]) == (4096, 2048)
        refused(in_process(capsys, *fit, server.address, "--tokens", 6000), 42, "0 are left")
    assert open_package(copy).load_bridge() is not None


class SlowRelay(Relay):
    """A relay over which a download takes seconds."""

    def _count(self, direction: Any, count: int) -> None:
        super()._count(direction, count)
        time.sleep(0.01)


@pytest.mark.server
def test_a_download_that_is_killed_goes_on_where_it_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_checkpoint("llama", tmp_path / "model", vocab_size=3 * MAX_FILE_CHUNK // (2 * 32 * 4))
    home = Home(tmp_path / "keys")
    offered = tiny_package(tmp_path / "package", model, signer=load_worker(home.folder))
    cloud = served(model, tmp_path / "parts", home=home.folder, emulator=offered.folder)
    out, part = tmp_path / "fetched", tmp_path / "fetched.part"
    with ThreadServer(cloud, home) as server:
        fetch = ("emulator", "fetch", "--key", home.key_file, "--out", out, "--cloud")
        with SlowRelay("127.0.0.1", server.port) as relay:
            killed = Shell(tmp_path).start(*fetch, server.address.replace(str(server.port), str(relay.port)))
            wait_for(lambda: size_of(part) >= MAX_FILE_CHUNK, killed)
            ended(killed, signal.SIGKILL)
        held = size_of(part)
        assert MAX_FILE_CHUNK <= held < 3 * MAX_FILE_CHUNK
        assert not out.exists()
        done = in_process(capsys, *fetch, server.address, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_down"] < size_of(out) - held + MAX_FILE_CHUNK // 8
    assert open_package(out).id == offered.id
    assert not part.exists()
