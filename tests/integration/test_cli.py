"""The commands in processes of their own, with Ray and a tiny model: what a user types, and what each mistake says."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors import safe_open
from support.cloud.clouds import Home, ThreadServer, served
from support.commands import ended, in_process, refused, wait_for
from support.models.tiny import tiny_checkpoint
from support.served_place import TRAIN, Place, served_place
from support.warm_processes import warm

from isthmus.cloud.control.ports import Listener
from isthmus.experiments.harness.launch import _of_session

pytestmark = pytest.mark.server

SMALL_DISK = "64k"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with served_place(tmp_path_factory.mktemp("cli")) as started:
        yield started


# The way it should go -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(place: Place) -> dict[str, Any]:
    """The report of a run in `run`."""
    done = place.edge("train", *TRAIN, "--out", "run", "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_train_leaves_an_adapter_a_report_and_a_loss_log(place: Place, trained: dict[str, Any]) -> None:
    run = place.folder / "run"
    assert json.loads((run / "report.json").read_text()) == trained
    assert trained["steps"] == 4
    assert trained["bytes_up"] > 0
    assert trained["bytes_down"] > 0
    assert trained["peak_bytes_cloud"] > 0
    assert trained["plan"] == "2:2"
    assert [json.loads(line)["step"] for line in (run / "losses.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    with safe_open(run / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        layers = {int(part) for name in file.keys() for part in name.split(".") if part.isdigit()}  # noqa: SIM118 - it is no dict
    assert layers == {0, 1, 4, 5}


def test_eval_measures_with_and_without_the_adapter(place: Place, trained: dict[str, Any]) -> None:
    data = ("--data", "tickets.jsonl", "--json")
    base = place.edge("eval", *data)
    tuned = place.edge("eval", *data, "--adapter", "run/adapter")
    assert base.returncode == tuned.returncode == 0, base.stderr + tuned.stderr
    before, after = json.loads(base.stdout), json.loads(tuned.stdout)
    assert before["examples"] == after["examples"] == 24
    assert after["loss"] < before["loss"]


def test_generate_continues_a_prompt(place: Place, trained: dict[str, Any]) -> None:
    arguments = ("generate", "Ticket 3:", "--cloud", place.cloud, "--key", place.key, "--adapter", "run/adapter")
    result = json.loads(place.good("edge", *arguments, "--max-new-tokens", "5", "--json"))
    assert set(result) == {"text", "bytes_up", "bytes_down", "tokens", "seconds", "tokens_per_s"}
    assert result["tokens"] <= 5
    assert result["bytes_up"] > 5 * 32 * 4


def test_status_tells_what_is_served(place: Place) -> None:
    status = json.loads(place.good("cloud", "status", "--home", place.folder / "cloud", "--json"))
    assert status["connection"] == Path(place.cloud).read_text().strip()
    assert (status["state"], status["plan"]) == ("serving", "2:2")
    assert status["sessions"] == {}
    assert status["stash_budget_bytes"] == 64 << 20
    assert "serving" in place.good("cloud", "status", "--home", place.folder / "cloud")


def test_the_process_of_serve_loads_no_torch_and_ray_starts_no_idle_ones(place: Place) -> None:
    assert place.serving is not None
    status = json.loads(place.good("cloud", "status", "--home", place.folder / "cloud", "--json"))
    loaded = {pid: "libtorch" in Path(f"/proc/{pid}/maps").read_text() for pid in _of_session(place.serving.pid)}
    assert [pid for pid, torch in loaded.items() if torch] == [worker["pid"] for worker in status["workers"]]
    assert not [pid for pid in loaded if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::IDLE")]


def test_the_workers_log_has_no_content(place: Place, trained: dict[str, Any]) -> None:
    text = (place.folder / "cloud" / "worker.log").read_text()
    events = [json.loads(line)["event"] for line in text.splitlines()]
    assert {"serving", "session_opened", "session_closed"} <= set(events)
    assert "Ticket" not in text
    assert "card" not in text
    assert Path(place.key).read_text().splitlines()[1] not in text


# The mistakes ---------------------------------------------------------------------------------------------------------


def test_a_wrong_fingerprint(place: Place) -> None:
    address, _, _ = Path(place.cloud).read_text().strip().partition("#")
    done = place.edge("train", *TRAIN, "--out", "never", cloud=f"{address}#SHA256:{'A' * 43}")
    refused(done, 31, "SHA256:AAAA")
    assert not (place.folder / "never").exists()


def test_an_edge_that_is_not_enrolled(place: Place) -> None:
    place.good("edge", "keygen", "--out", "stranger", "--comment", "stranger")
    done = place.edge("eval", "--data", "tickets.jsonl", key=str(place.folder / "stranger"))
    refused(done, 32, "not enrolled", "isthmus cloud enroll")


def test_a_cloud_that_nobody_runs(place: Place) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    own = ("--connect-timeout", "0.5", "--data", "tickets.jsonl")
    done = place.run("edge", "eval", "--cloud", f"isthmus://{address}#SHA256:{'A' * 43}", "--key", place.key, *own)
    refused(done, 40, address, "check that it runs")
    refused(place.run("cloud", "status", "--home", place.folder / "nowhere"), 40, "isthmus cloud serve")


def test_a_missing_key(place: Place) -> None:
    refused(place.edge("eval", "--data", "tickets.jsonl", key="no-such-key"), 30, "no-such-key", "isthmus edge keygen")


def test_a_key_is_not_overwritten(place: Place) -> None:
    before = Path(place.key).read_bytes()
    refused(place.run("edge", "keygen", "--out", place.key), 30, "not overwritten")
    assert Path(place.key).read_bytes() == before


@pytest.mark.parametrize(
    ("model", "layers", "code", "texts"),
    [("no-such-model", "2:2", 20, ["no-such-model"]), ("tiny", "3:3", 22, ["3:3"]), ("tiny", "two", 22, ["two"])],
)
def test_a_model_or_a_plan_that_does_not_fit(
    place: Place, model: str, layers: str, code: int, texts: list[str]
) -> None:
    environment = dict(place.environment)
    place.environment["HF_HUB_OFFLINE"] = "1"
    try:
        home = place.folder / "cloud"
        done = place.run(
            "cloud", "serve", "--model", model, "--edge-layers", layers, "--home", home, "--listen", "127.0.0.1:0"
        )
    finally:
        place.environment = environment
    refused(done, code, *texts)


@pytest.mark.long
def test_what_only_a_worker_finds_out_is_told_as_the_rest_and_nothing_stays(place: Place, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama", tmp_path / "damaged") / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    own = ("--model", model.parent, "--home", Home(tmp_path).folder, "--listen", "127.0.0.1:0", "--metrics", "")
    command = [sys.executable, "-m", "isthmus.cli.main", "cloud", "serve", *map(str, own)]
    serving = subprocess.Popen(
        [*command, "--connection-file", str(tmp_path / "connection")],
        env={**place.environment, "ISTHMUS_CACHE": str(tmp_path / "cache")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, errors = serving.communicate(timeout=120)
    refused(subprocess.CompletedProcess(command, serving.returncode, out, errors), 23, str(model), "is damaged")
    assert not out
    assert not (tmp_path / "connection").exists()
    assert not (tmp_path / "cloud" / "serving.json").exists()
    assert not [path for path in (tmp_path / "cache" / "edge-parts").iterdir() if path.is_dir()]
    deadline = time.monotonic() + 30
    while _of_session(serving.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_home_that_is_served_already(place: Place) -> None:
    assert place.serving is not None
    home = place.folder / "cloud"
    state = (home / "serving.json").read_text()
    own = ("--model", place.model, "--home", home, "--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0")
    for options in ((), ("--pipeline", "2")):  # whatever it would serve
        done = place.run("cloud", "serve", *own, *options)
        refused(done, 61, f"process {place.serving.pid} serves with the home {home}", "--home")
    assert (home / "serving.json").read_text() == state  # the running cloud is still known
    assert not (home / "pipeline").exists()


def test_ray_keeps_to_this_user_and_to_this_machine(place: Place) -> None:
    assert place.serving is not None
    told = " ".join((place.folder / "serve.out").read_text().split())
    assert "the worker computes with 1 thread; this process may use" in told
    assert "root_key lies here, and no worker needs it" in told
    assert "other machines can reach" not in told
    processes = {pid: psutil.Process(pid) for pid in _of_session(place.serving.pid)}
    listening = [
        Listener(process.name(), pid, each.laddr.ip, each.laddr.port)
        for pid, process in processes.items()
        for each in process.net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    ]
    assert {"raylet", "gcs_server", "ray::Worker", "ray::Controller"} <= {each.process for each in listening}
    assert not [str(each) for each in listening if not each.private]
    status = json.loads(place.good("cloud", "status", "--home", place.folder / "cloud", "--json"))
    announced = {int(status["connection"].partition("#")[0].rpartition(":")[2])}
    announced |= {int(json.loads((place.folder / "cloud" / "serving.json").read_text())["metrics"].rpartition(":")[2])}
    assert not [str(each) for each in listening if each.port not in announced and str(each.port) not in told]
    sockets = [each.laddr for process in processes.values() for each in process.net_connections("unix") if each.laddr]
    folders = {Path(path).parents[3] for path in sockets if path.endswith(("/raylet", "/plasma_store"))}
    assert [oct(folder.stat().st_mode & 0o777) for folder in folders] == ["0o700"]


def test_a_port_in_use(place: Place) -> None:
    port = Path(place.cloud).read_text().split("#")[0].rpartition(":")[2]
    home = place.folder / "another"
    place.good("cloud", "keygen", "--home", home, "--no-passphrase")
    done = place.run("cloud", "serve", "--model", place.model, "--home", home, "--listen", f"127.0.0.1:{port}")
    refused(done, 41, f"127.0.0.1:{port}", "--listen")
    done = place.run(
        "cloud",
        "serve",
        "--model",
        place.model,
        "--home",
        home,
        "--listen",
        "127.0.0.1:0",
        "--metrics",
        f"127.0.0.1:{port}",
    )
    refused(done, 41, "--metrics")


def test_tls_files_that_are_none(place: Place) -> None:
    (place.folder / "junk.pem").write_text("no certificate")
    tls = ("--tls-cert", "junk.pem", "--tls-key", "junk.pem")
    own = ("--model", place.model, "--home", place.folder / "cloud", "--listen", "127.0.0.1:0")
    refused(place.run("cloud", "serve", *own, *tls), 10, "junk.pem")
    refused(place.run("cloud", "serve", *own, *tls[:2]), 10, "--tls-cert and --tls-key")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("empty.jsonl", "", ["empty.jsonl"]),
        ("broken.jsonl", '{"text": "a fine line"}\n{"text": "no end\n', ["broken.jsonl", "line 2"]),
        ("absent.jsonl", None, ["absent.jsonl"]),
    ],
)
def test_data_that_are_none(place: Place, name: str, content: str | None, texts: list[str]) -> None:
    if content is not None:
        (place.folder / name).write_text(content)
    refused(place.edge("train", "--data", name, "--steps", "1", "--out", "never"), 11, *texts)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--codec", "zip"), "codec"),
        (("--steps", "0"), "steps"),
        (("--steps", "3", "--epochs", "2"), "exclude each other"),
    ],
)
def test_a_flag_that_makes_no_sense(place: Place, arguments: tuple[str, ...], text: str) -> None:
    refused(place.edge("train", "--data", "tickets.jsonl", *arguments), 10, text)


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (("--codec", "auto:2"), ["'auto:2' names no target", "auto:0.99"]),
        (("--codec", "auto", "--span-cache-mib", "9"), ["name a codec"]),
        (("--codec-every", "0"), ["codec_every = 0"]),
        (("--overlap", "3", "--accumulate", "2"), ["overlap = 3", "raise --accumulate"]),
        (("--span-cache-mib", "9", "--sites", "all"), ["span_cache_mib = 9", "give sites = none"]),
        (("--sites", "9-4"), ["sites = '9-4'", "10-12"]),
        (("--sites", "all", "--method", "full"), ["method full"]),
        (("--site-policy", "best", "--sites", "all"), ["site_policy = 'best'", "'kill-revive'"]),
        (("--site-policy", "random"), ["--sites all"]),
        (("--site-traffic", "2", "--sites", "all", "--site-policy", "even"), ["site_traffic = 2.0"]),
        (("--site-policy", "even", "--sites", "all", "--method", "adalora"), ["needs them of all"]),
    ],
)
def test_a_way_of_training_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], texts: list[str]
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a fine line"}\n')
    needed = ("--cloud", f"isthmus://127.0.0.1:1#SHA256:{'A' * 43}", "--key", tmp_path / "none")
    needed = (*needed, "--data", tmp_path / "data.jsonl")
    refused(in_process(capsys, "edge", "train", *needed, *arguments, "--out", tmp_path / "out"), 10, *texts)
    assert not (tmp_path / "out").exists()


def test_a_plan_or_a_link_that_makes_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    refused(in_process(capsys, "plan", "--link", "fast"), 10, "'fast'")
    refused(in_process(capsys, "bench", "link", "--rate", "fast"), 10, "'fast' is not a rate")


def test_a_setting_that_does_not_exist(place: Place) -> None:
    (place.folder / "run.toml").write_text('data = "tickets.jsonl"\nlearning_rat = 0.1\n')
    refused(place.edge("train", "--config", "run.toml"), 10, "learning_rat", "learning_rate")


def test_a_loss_that_is_no_number(place: Place) -> None:
    done = place.edge("train", *TRAIN, "--learning-rate", "1e30", "--out", "diverged")
    refused(done, 50, "--learning-rate")
    assert not (place.folder / "diverged" / "adapter").exists()


def test_a_full_disk(place: Place, tmp_path: Path) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SMALL_DISK}", "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here: root's privileges are needed")
    try:
        done = place.edge("train", *TRAIN, "--rank", "32", "--out", tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)
    refused(done, 51, str(tmp_path), "free some space")


def test_a_checkpoint_of_another_model(place: Place, trained: dict[str, Any], tmp_path: Path) -> None:
    other = served(tiny_checkpoint("llama", tmp_path / "other", seed=5), tmp_path / "parts")
    with ThreadServer(other, Home(tmp_path)) as server:
        own = {"cloud": server.address, "key": str(server.home.key_file)}
        before = sorted(path.name for path in (place.folder / "run").iterdir())
        refused(
            place.edge("train", *TRAIN, "--out", "run", "--resume", **own),
            23,
            "checkpoint-4 cannot be resumed",
            "digest",
        )
        assert sorted(path.name for path in (place.folder / "run").iterdir()) == before
    wide = served(tiny_checkpoint("llama", tmp_path / "wide", hidden_size=64, head_dim=16), tmp_path / "wide-parts")
    with ThreadServer(wide, Home(tmp_path / "second")) as server:
        own = {"cloud": server.address, "key": str(server.home.key_file)}
        refused(place.edge("eval", "--data", "tickets.jsonl", "--adapter", "run/adapter", **own), 23, "adapter")


def test_a_run_is_not_overwritten_and_goes_on_with_resume(place: Place, trained: dict[str, Any]) -> None:
    refused(place.edge("train", *TRAIN, "--out", "run"), 10, "--resume")
    assert json.loads((place.folder / "run" / "report.json").read_text()) == trained


def test_ctrl_c_saves_and_says_how_to_go_on(place: Place) -> None:
    own = ("--cloud", place.cloud, "--key", place.key, *TRAIN, "--steps", "100000", "--out", "long")
    process = warm().start(("edge", "train", *own), place.environment, place.folder)
    log = place.folder / "long" / "losses.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size > 0, process)
    done = ended(process, signal.SIGINT)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert "--resume" in done.stderr.splitlines()[-1]
    assert list((place.folder / "long").glob("checkpoint-*"))


# Last, because it ends the cloud --------------------------------------------------------------------------------------


def test_sigterm_drains_and_ends_cleanly(place: Place) -> None:
    assert place.serving is not None
    place.serving.send_signal(signal.SIGTERM)
    assert place.serving.wait(60) == 0, (place.folder / "serve.out").read_text()
    events = [json.loads(line) for line in (place.folder / "cloud" / "worker.log").read_text().splitlines()]
    assert events[-1]["event"] == "stopped"
    assert events[-1]["all_answered"] is True
    assert not (place.folder / "cloud" / "serving.json").exists()
    folders = json.loads((place.folder / "cloud" / "serve.lock").read_text())
    assert not Path(folders["ray_folder"]).exists()
    refused(place.run("cloud", "status", "--home", place.folder / "cloud"), 40, "no cloud serves")
