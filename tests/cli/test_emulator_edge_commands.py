"""`isthmus emulator fetch | return` against a real server on the loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.cloud.clouds import Home, ThreadServer, served
from support.emulator.packages import tiny_package, tuned
from support.models.tiny import tiny_checkpoint
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from isthmus.cli.emulator_edge_commands import app
from isthmus.common.errors import AdapterError, ConfigError, LocalProtocolError, RefusedError
from isthmus.edge.client.link import Link
from isthmus.emulator.package.package import Package, open_package
from isthmus.protocol.enrolment import Quota
from isthmus.protocol.secure.keys import Fingerprint, load_edge, load_worker

PLANS = {"1:3": (1, 3), "2:1": (2, 5)}
"""Of packages beside a cloud split 1:1, and the layers of their middles."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    torch.set_num_threads(1)
    return Home(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, home: Home) -> Package:
    folder = tmp_path_factory.mktemp("owner")
    return tiny_package(folder / "package", tiny_checkpoint("llama", folder / "model"), signer=load_worker(home.folder))


@pytest.fixture(scope="module")
def adapter(package: Package) -> Path:
    return tuned(package, package.folder.parent / "adapter")


@pytest.fixture(scope="module")
def server(home: Home, package: Package) -> Iterator[ThreadServer]:
    owner = package.folder.parent
    cloud = served(owner / "model", owner / "parts", home=home.folder, emulator=package.folder)
    with ThreadServer(cloud, home) as running:
        yield running


def command(server: ThreadServer, *words: str) -> Result:
    key = str(server.home.key_file)
    return CliRunner().invoke(app, [words[0], "--cloud", server.address, "--key", key, *words[1:]])


def test_a_package_is_fetched_tuned_on_and_the_adapter_returned(
    server: ThreadServer, package: Package, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "package"
    fetched = command(server, "fetch", "--out", str(out), "--json")
    assert fetched.exit_code == 0, fetched.output
    said = json.loads(fetched.stdout)
    assert (said["id"], said["signer"]) == (package.id, str(server.home.pin))
    assert said["bytes_down"] > (out / "emulator.safetensors").stat().st_size
    assert open_package(out).id == package.id
    assert package.id in command(server, "fetch", "--out", str(out)).stdout

    public = tmp_path / "public.jsonl"
    public.write_text("".join(json.dumps({"text": f"{i * i * 37} words about {i}"}) + "\n" for i in range(200)))
    words = ("fit", "--package", str(out), "--text", str(public), "--tokens", "2000", "--block", "50", "--json")
    fitted = command(server, *words, "--data", "none")
    assert fitted.exit_code == 0, fitted.output
    said = json.loads(fitted.stdout)
    assert (said["tokens"], said["package"]) == (2000, package.id)
    assert said["bytes_up"] > 2000 * 32 * 4
    assert Path(said["bridge"]).is_file()
    assert open_package(out).load_bridge() is not None
    forgotten = command(server, *words)  # nobody forgets to say what is private
    assert forgotten.exit_code == 2
    assert "'data' is missing: give --data" in forgotten.output

    returned = command(server, "return", "--adapter", str(adapter), "--json")
    assert returned.exit_code == 0, returned.output
    assert "plugged in: lora" in json.loads(returned.stdout)["message"]
    alice = Fingerprint.of(load_edge(server.home.key_file).public_key().public_bytes_raw())
    plugged = (server.home.folder / "adapters").glob("*/*/plugged")
    assert [folder.parent.name for folder in plugged] == [alice.digest.hex()]


def test_of_several_packages_one_is_fetched_by_its_name(home: Home, package: Package, tmp_path: Path) -> None:
    owner, out = package.folder.parent, str(tmp_path / "out")
    other = tiny_package(
        tmp_path / "other", owner / "model", signer=load_worker(home.folder), preset="guarded", keep=1.0
    )
    packages = {"first": package.folder, "second": other.folder}
    with ThreadServer(served(owner / "model", owner / "parts", home=home.folder, emulator=packages), home) as server:
        unnamed = command(server, "fetch", "--out", out).exception
        assert isinstance(unnamed, RefusedError)
        assert "fetch one by name, with --package: first (split 2:2), second (preset guarded, split 2:2)" in str(
            unnamed
        )
        assert isinstance(command(server, "fetch", "--package", "third", "--out", out).exception, RefusedError)
        assert isinstance(command(server, "fetch", "--package", "a b", "--out", out).exception, ConfigError)
        assert (
            json.loads(command(server, "fetch", "--package", "second", "--out", out, "--json").stdout)["id"] == other.id
        )
        assert open_package(Path(out)).id == other.id
        for tuned_on in (package, other):
            returned = command(server, "return", "--adapter", str(tuned(tuned_on, tmp_path / tuned_on.id, seed=2)))
            assert f"tuned on the package {tuned_on.id[:16]}" in returned.stdout


def test_over_a_cloud_of_another_split_the_true_middle_is_a_part_of_its_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    home, model = Home(tmp_path), tiny_checkpoint("llama", tmp_path / "model")
    bob = home.new_edge("bob", quota=Quota(max_tokens=30))
    offered = {plan: tiny_package(tmp_path / plan, model, plan=plan, signer=load_worker(home.folder)) for plan in PLANS}
    cloud = served(
        model,
        tmp_path / "parts",
        plan="1:1",
        home=home.folder,
        emulator={f"p{number}": offered[plan].folder for number, plan in enumerate(PLANS)},
    )
    ids = torch.arange(20)[None] % 7
    with torch.no_grad():
        states = AutoModelForCausalLM.from_pretrained(model)(ids, output_hidden_states=True).hidden_states
    with ThreadServer(cloud, home) as server:
        with server.link() as link:
            link.open(60)
            for plan, (start, stop) in PLANS.items():
                assert torch.equal(link.forward_span(states[start], None, None, keep=False, plan=plan)[0], states[stop])
                assert not torch.equal(link.forward_span(states[start], None, None, keep=False)[0], states[stop])
            with pytest.raises(RefusedError, match="no package of the split 2:2"):
                link.forward_span(states[2], None, None, keep=False, plan="2:2")
            with pytest.raises(LocalProtocolError, match="keeps nothing"):
                link.forward_span(states[1], None, None, keep=True, plan="1:3")
        with server.link(bob) as link:  # whose allowance counts what a part computes, and not what is refused
            link.open(60)
            for plan, refused in (("2:2", "no package"), ("1:3", ""), ("1:3", "10 are left")):
                with pytest.raises(RefusedError, match=refused) if refused else nullcontext():
                    link.forward_span(states[1], None, None, keep=False, plan=plan)

        out, public = tmp_path / "out", tmp_path / "public.txt"
        public.write_text("".join(f"{i * i * 37} words about {i}\n" for i in range(200)))
        assert command(server, "fetch", "--package", "p0", "--out", str(out)).exit_code == 0
        words = ("--package", str(out), "--text", str(public), "--tokens", "2000", "--block", "50", "--data", "none")
        fitted = command(server, "fit", *words, "--json")
        assert fitted.exit_code == 0, fitted.output
        said = json.loads(fitted.stdout)
        assert said["kl_after"] < said["kl_before"]
        returned = command(server, "return", "--adapter", str(tuned(open_package(out), tmp_path / "adapter")))
        assert isinstance(returned.exception, RefusedError)
        assert "split plan '1:3', and this model is split 1:1: return the adapter to" in str(returned.exception)
        assert "or plug it with the package that it was tuned on" in str(returned.exception)


def test_what_cannot_be_returned_has_its_error(server: ThreadServer, adapter: Path, tmp_path: Path) -> None:
    nothing = command(server, "return", "--adapter", str(tmp_path / "none"))
    assert isinstance(nothing.exception, AdapterError)
    other = Path(shutil.copytree(adapter, tmp_path / "other"))
    (other / "adapter_config.json").write_text("{}")
    refused = command(server, "return", "--adapter", str(other))
    assert isinstance(refused.exception, RefusedError)
    assert "type 'None'" in str(refused.exception)


@pytest.mark.parametrize(
    ("words", "method"), [(["fetch", "--out", "x"], "fetch_package"), (["return", "--adapter", "x"], "return_adapter")]
)
def test_an_interrupted_command_says_how_to_go_on(
    server: ThreadServer, monkeypatch: pytest.MonkeyPatch, words: list[str], method: str
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Link, method, stop)
    result = command(server, *words)
    assert result.exit_code == 130
    assert "goes on from here" in result.output
