"""Jobs against a real cloud: whatever dies, they end with the bits of `isthmus edge train`."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cloud.clouds import ThreadServer, served
from support.cloud.train_runs import Runs, cloud_for_runs
from support.daemon.jobs import jobs_process
from support.daemon.jobs.job_homes import TRAINING, Jobs, ended, jobs_of, said, training, until
from support.emulator.packages import tiny_package
from support.warm_processes import WarmPopen

from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.common.errors import LeakBudgetError, RefusedError
from isthmus.common.files import write_atomic
from isthmus.daemon.jobs.job_names import checkpoint_id, result_id
from isthmus.daemon.jobs.job_runner import Patience, Waiting
from isthmus.daemon.jobs.job_service import NewJob
from isthmus.daemon.state.tables import Job, Model, Traffic
from isthmus.edge.bridge_fit import run_fit
from isthmus.edge.config.client_config import EvalConfig, FitConfig
from isthmus.edge.config.training_config import TuneConfig
from isthmus.edge.emulator_run import run_tuning
from isthmus.edge.split_run import run_evaluation
from isthmus.emulator.package.manifest import MANIFEST_FILE, Tuning
from isthmus.protocol.secure.keys import load_worker

pytestmark = pytest.mark.server

LONG = {"steps": 12}
"""Long enough that something can happen in the middle."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("jobs")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that `isthmus edge train` makes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(out, **{**TRAINING, **LONG})
    return out


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[WarmPopen]:
    """The processes that are started for jobs."""
    found = []

    class Noted(WarmPopen):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            found.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    return found


def weights(folder: Path) -> bytes:
    return (folder / ADAPTER_WEIGHTS).read_bytes()


def in_the_middle(jobs: Jobs, job_id: str, step: int = 2) -> None:
    """Wait until a job has made some steps, and see that it has not made them all."""
    run = jobs.home.job(job_id) / "run"
    deadline = time.monotonic() + 60
    while not any((run / f"checkpoint-{n}").exists() for n in (step, step + 1)):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    assert not (run / "adapter").exists()


@pytest.mark.usefixtures("workers")
def test_a_job_ends_with_the_adapter_of_edge_train(runs: Runs, undisturbed: Path, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "home", runs, save_every=5, checkpoints_per_job=2)
    with jobs.service() as service:
        made = service.create("one", training(**LONG, eval_every=5)).id
        job = ended(service, made)
        assert (job.status, job.step, job.total, job.attempts) == ("succeeded", 12, 12, 1), said(service, made)
        losses = [json.loads(line) for line in (undisturbed / "losses.jsonl").read_text().splitlines()]
        lines = list(service.steps("one", made))
        assert [{name: line[name] for name in losses[0]} for line in lines] == losses
        assert [line["step"] for line in service.steps("one", made, after=10)] == [11, 12]
        kept, _ = service.checkpoints("one", made)
        assert [model.step for model in kept] == [12, 10]
        assert kept[1].metrics["train_loss"] == losses[9]["loss"]
        assert kept[1].metrics["train_mean_token_accuracy"] == lines[9]["accuracy"]
        assert {"valid_loss", "full_valid_loss"} < set(kept[1].metrics)
    assert weights(jobs.home.model(result_id(made))) == weights(undisturbed / "adapter")
    assert weights(jobs.home.model(checkpoint_id(made, 12))) == weights(undisturbed / "adapter")
    assert weights(jobs.home.model(checkpoint_id(made, 10))) != weights(undisturbed / "adapter")
    rows = list(csv.DictReader(io.StringIO(jobs.home.file(job.results[0]).read_text())))
    assert [float(row["train_loss"]) for row in rows] == [line["loss"] for line in losses]
    assert [float(row["train_accuracy"]) for row in rows] == [line["accuracy"] for line in lines]
    assert [row["step"] for row in rows if row["valid_loss"]] == ["5", "10", "12"]
    assert not list((jobs.home.job(made) / "run").glob("checkpoint-*"))
    report = json.loads((jobs.home.job(made) / "run" / "report.json").read_text())
    with jobs.database.reading() as session:
        traffic = session.query(Traffic).one()
    assert traffic.bytes_up > report["bytes_up"] > 0  # evaluations and what was fetched cross, too
    assert traffic.calls > report["calls"] > 0


def test_a_worker_that_is_killed_in_the_middle_changes_no_bit(
    runs: Runs, undisturbed: Path, workers: list[WarmPopen], tmp_path: Path
) -> None:
    jobs = jobs_of(tmp_path / "home", runs, save_every=1)
    with jobs.service() as service:
        made = service.create("one", training(**LONG)).id
        in_the_middle(jobs, made)
        workers[0].kill()
        job = ended(service, made)
        assert (job.status, job.attempts) == ("succeeded", 2), said(service, made)
        assert any("ended by signal 9" in line for line in said(service, made))
        steps = [event.data["step"] for event in service.events("one", made, limit=1000)[0] if event.kind == "metrics"]
        assert sorted(set(steps)) == list(range(13))  # of step 0 the validation
    assert weights(jobs.home.model(result_id(made))) == weights(undisturbed / "adapter")


@pytest.mark.parametrize("dies", ["daemon", "both"])
def test_a_daemon_that_is_killed_in_the_middle_changes_no_bit(
    runs: Runs, undisturbed: Path, workers: list[WarmPopen], tmp_path: Path, dies: str
) -> None:
    jobs = jobs_of(tmp_path / "home", runs, save_every=1)
    words = (jobs.home.path, runs.server.address, runs.server.home.key_file, runs.texts, json.dumps(LONG))
    with WarmPopen(
        [sys.executable, jobs_process.__file__, *map(str, words)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        made = daemon.stdout.readline().strip()
        in_the_middle(jobs, made)
        daemon.kill()
        if dies == "both":
            os.kill(_holder(jobs.home.job(made) / ".worker.lock"), signal.SIGKILL)
    with jobs.service() as service:
        assert service.get("one", made).status == "running"
        job = ended(service, made)
        assert (job.status, job.attempts) == ("succeeded", 2), said(service, made)
    assert weights(jobs.home.model(result_id(made))) == weights(undisturbed / "adapter")


def _holder(lock: Path) -> int:
    """The process that has locked a file."""
    inode = str(lock.stat().st_ino)
    for line in Path("/proc/locks").read_text().splitlines():
        words = line.split()
        if words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
            return int(words[4])
    raise AssertionError("nobody has locked it")


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize(("stop", "go_on", "status"), [("pause", "resume", "paused"), ("cancel", "retry", "cancelled")])
def test_a_job_that_is_stopped_and_gone_on_with_has_the_same_bits(
    runs: Runs, undisturbed: Path, tmp_path: Path, stop: str, go_on: str, status: str
) -> None:
    jobs = jobs_of(tmp_path / "home", runs, save_every=1)
    with jobs.service() as service:
        made = service.create("one", training(**LONG)).id
        in_the_middle(jobs, made)
        getattr(service, stop)("one", made)
        job = until(service, made, lambda job: job.status == status)
        assert 0 < job.step < 12
        getattr(service, go_on)("one", made)
        assert ended(service, made).status == "succeeded"
    assert weights(jobs.home.model(result_id(made))) == weights(undisturbed / "adapter")


@pytest.mark.usefixtures("workers")
def test_a_daemon_that_is_stopped_saves_its_jobs_and_goes_on_with_them(runs: Runs, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "home", runs, save_every=100_000)
    with jobs.service() as service:
        made = service.create("one", training(steps=100_000)).id
        until(service, made, lambda job: job.step > 0)
    (saved,) = (jobs.home.job(made) / "run").glob("checkpoint-*")
    with jobs.service() as service:
        job = until(service, made, lambda job: job.attempts == 2 and job.step > int(saved.name.rpartition("-")[2]))
        assert job.status == "running"
        service.cancel("one", made)
        ended(service, made)
        assert (jobs.home.job(made) / "run" / "losses.jsonl").read_text().startswith('{"step": 1, ')


@pytest.mark.usefixtures("workers")
def test_a_job_waits_for_a_cloud_that_is_away(runs: Runs, undisturbed: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = runs.server
    address = there.address.replace(f":{there.port}#", f":{port}#")
    client = {"cloud": address, "key": there.home.key_file, "connect_timeout": 3.0, "give_up_after": 1.0}
    jobs = jobs_of(tmp_path / "home", runs, client=client)
    with jobs.service(Patience(first=0.1, longest=0.1)) as service:
        made = service.create("one", training(**LONG)).id
        waits: list[Waiting] = []

        def gave_up(job: Job) -> bool:
            waits.extend(filter(None, [service.waiting(job)]))
            told = any("next attempt" in line for line in said(service, job.id))
            return told and any("stayed away" in wait.reason for wait in waits)

        job = until(service, made, gave_up)
        assert {wait.cloud for wait in waits} == {"main"}
        assert job.status in ("queued", "running")
        assert job.error is None
        with ThreadServer(there.served, there.home, listen=f"127.0.0.1:{port}"):
            until(service, made, lambda job: service.waiting(job) is None)
            job = ended(service, made)
        assert service.waiting(job) is None
        assert "The cloud main answers again" in said(service, made)
        assert job.status == "succeeded", said(service, made)
        assert job.attempts > 1
    assert weights(jobs.home.model(result_id(made))) == weights(undisturbed / "adapter")


@pytest.mark.usefixtures("workers")
def test_an_error_of_a_run_is_told_with_its_code(runs: Runs, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "home", runs)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    jobs.upload("file-empty", empty)
    with jobs.service() as service:
        job = ended(service, service.create("one", training(data="file-empty")).id)
    assert (job.status, job.attempts) == ("failed", 1)
    assert job.error is not None
    assert job.error["code"] == 11
    assert "Traceback" not in (jobs.home.job(job.id) / "worker.log").read_text()


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize(
    ("budget", "status"), [pytest.param("tokens<=1", "succeeded", marks=pytest.mark.long), ("tokens<=0.01", "failed")]
)
def test_a_jobs_leak_budget_is_measured_and_told(runs: Runs, tmp_path: Path, budget: str, status: str) -> None:
    jobs = jobs_of(tmp_path / "home", runs)
    public = tmp_path / "public.jsonl"
    public.write_text("".join(json.dumps({"text": f"other {n}: " + "ba" * (n % 5)}) + "\n" for n in range(24)))
    jobs.upload("file-public", public)
    with jobs.service() as service:
        new = training(leak_budget=budget, leak_sample=4, steps=1, public="file-public")
        job = ended(service, service.create("one", new).id)
        told = [event.message for event in service.events("one", job.id, limit=100)[0]]
    assert job.status == status, told
    if job.error is None:
        assert any(line.startswith("Leak: tokens ≤ ") and "measured on" in line for line in told)
    else:
        assert job.error["code"] == LeakBudgetError.exit_code
        assert "the leak budget tokens<=0.01 is broken: nearest_neighbour recovers" in job.error["message"]


@pytest.mark.usefixtures("workers")
def test_what_a_job_has_tuned_is_evaluated_and_answers_prompts(runs: Runs, undisturbed: Path, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "home", runs)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"case {n}:"}) + "\n" for n in range(3)))
    with jobs.service() as service:
        tuned = service.create("one", training(**LONG)).id
        ended(service, tuned)
        with jobs.database.reading() as session:
            name = session.query(Model).filter(Model.step.is_(None)).one().name
        spec = {"data": str(runs.texts), "adapter": name, "threads": 1}
        measured = service.create("one", NewJob("evaluate", "tiny", spec)).id
        jobs.upload("file-prompts", prompts)
        spec = {"prompts": "file-prompts", "adapter": name, "max_new_tokens": 3}
        answered = service.create("one", NewJob("generate", "tiny", spec)).id
        job = ended(service, measured)
        assert job.status == "succeeded", job.error
        config = EvalConfig(cloud=runs.server.address, key=runs.server.home.key_file, data=str(runs.texts), threads=1)
        loss = json.loads(jobs.home.file(job.results[0]).read_text())["loss"]
        assert loss == run_evaluation(config, undisturbed / "adapter")["loss"]
        assert loss != run_evaluation(config, None)["loss"]
        job = ended(service, answered)
        assert (job.status, job.step, job.total) == ("succeeded", 3, 3), job.error
        assert job.speed is not None
        answers = [json.loads(line) for line in jobs.home.file(job.results[0]).read_text().splitlines()]
        assert [answer["index"] for answer in answers] == [0, 1, 2]
        assert all(0 < answer["tokens"] <= 3 for answer in answers)


@pytest.mark.usefixtures("workers")
def test_a_job_tunes_on_a_package_as_the_command_does(runs: Runs, tmp_path: Path) -> None:
    signer = load_worker(runs.server.home.folder)
    package = tiny_package(tmp_path / "package", runs.model, plan="1:1", signer=signer).folder
    config = TuneConfig.model_validate(
        {**TRAINING, "package": package, "data": str(runs.texts), "out": tmp_path / "alone"}
    )
    run_tuning(config)
    jobs = jobs_of(tmp_path / "home", runs, save_every=1)
    with jobs.service() as service:
        spec = {**TRAINING, "package": str(package), "data": "file-texts"}
        made = service.create("one", NewJob("tune", "tiny", spec)).id
        assert ended(service, made).status == "succeeded", said(service, made)
    assert weights(jobs.home.model(result_id(made))) == weights(tmp_path / "alone" / "adapter")
    with jobs.database.reading() as session:
        assert session.query(Traffic).all() == []


@pytest.mark.usefixtures("workers")
def test_a_job_fetches_the_clouds_package_once_and_sends_nothing_else(runs: Runs, tmp_path: Path) -> None:
    home = runs.server.home
    advice = Tuning(learning_rate=1e-2, steps=5, rank=2, warmup_steps=0)
    package = tiny_package(
        tmp_path / "package", runs.model, plan="1:1", signer=load_worker(home.folder), tuning=advice
    ).folder
    alone = {"package": package, "data": str(runs.texts), "batch": 2, "threads": 1, "out": tmp_path / "alone"}
    run_tuning(TuneConfig.model_validate(alone))
    new = NewJob("tune", "tiny", {"data": "file-texts", "batch": 2, "threads": 1})
    offering = served(
        runs.model, tmp_path / "parts", plan="1:1", home=home.folder.resolve(), emulator=package.resolve()
    )
    with ThreadServer(offering, home) as server:
        jobs = jobs_of(tmp_path / "home", runs, client={"cloud": server.address, "connect_timeout": 60.0})
        with jobs.service() as service:
            first = ended(service, service.create("one", new).id)
            assert (first.status, first.total) == ("succeeded", 5), said(service, first.id)
            told = said(service, first.id)
            second = ended(
                service,
                service.create("two", dataclasses.replace(new, spec=new.spec | {"data": str(runs.texts)})).id,
                "two",
            )
    assert second.status == "succeeded"
    assert any("the cloud is asked for nothing else" in line for line in told)
    assert any("advised by the package: --layers above --steps 5" in line for line in told)
    size = sum(file.stat().st_size for file in package.iterdir())
    assert size < first.bytes_down < size + 100_000
    assert second.bytes_down < 20_000  # what the daemon has is not fetched again
    assert 0 < second.bytes_up < first.bytes_up < 50_000
    assert not (jobs.home.job(first.id) / "package").exists()
    away = Patience(first=0.1, longest=0.1)
    pin = server.address.rpartition("SHA256:")[2]
    other = server.address.replace(pin, ("B" if pin[0] == "A" else "A") + pin[1:])  # another key's
    jobs = jobs_of(tmp_path / "home", runs, client={"cloud": other, "connect_timeout": 0.5})
    with jobs.service(away) as service:  # a package of somebody else's is no stand-in
        waits = service.create("one", dataclasses.replace(new, suffix="waits")).id
        until(service, waits, lambda job: any("next attempt" in line for line in said(service, job.id)))
        service.cancel("one", waits)
        assert ended(service, waits).status == "cancelled"
    manifest = jobs.home.package("main") / MANIFEST_FILE
    whole = manifest.read_bytes()
    manifest.write_bytes(b"{}")
    jobs = jobs_of(tmp_path / "home", runs, client={"cloud": server.address, "connect_timeout": 0.5})
    with jobs.service(away) as service:  # nor is a damaged one; a whole one stands in for a cloud that is away
        made = service.create("one", dataclasses.replace(new, suffix="third")).id
        until(service, made, lambda job: service.waiting(job) is not None)
        write_atomic(manifest, whole)
        third = ended(service, made)
        assert third.status == "succeeded", said(service, third.id)
        assert any("tunes on the package that was fetched before" in line for line in said(service, third.id))
        assert "The job needs its cloud no more" in said(service, third.id)
    assert third.bytes_up == 0
    for job in (first, second, third):
        assert weights(jobs.home.model(result_id(job.id))) == weights(tmp_path / "alone" / "adapter")


@pytest.mark.usefixtures("workers")
def test_a_job_names_a_package_and_fits_a_bridge_to_public_texts(runs: Runs, tmp_path: Path) -> None:
    home = runs.server.home
    packages = {
        name: tiny_package(tmp_path / name, runs.model, keep=keep, plan="1:1", signer=load_worker(home.folder)).folder
        for name, keep in (("near", 0.5), ("whole", 1.0))
    }
    letters = torch.randint(97, 123, (40, 60), generator=torch.Generator().manual_seed(0)).tolist()
    public = tmp_path / "public.jsonl"
    public.write_text("".join(json.dumps({"text": bytes(each).decode()}) + "\n" for each in letters))
    tuning = {"data": str(runs.texts), "batch": 2, "threads": 1, "steps": 3, "max_length": 64}
    specs = {
        "nameless": tuning,
        "unknown": tuning | {"package": "neat"},
        "shared": tuning | {"package": "near", "public": str(runs.texts)},
        "plain": tuning | {"package": "near"},
        "bridged": tuning | {"package": "near", "public": str(public), "public_tokens": 1024},
    }
    emulators = {name: folder.resolve() for name, folder in packages.items()}
    offering = served(runs.model, tmp_path / "parts", plan="1:1", home=home.folder.resolve(), emulator=emulators)
    with ThreadServer(offering, home) as server:
        jobs = jobs_of(tmp_path / "home", runs, client={"cloud": server.address, "connect_timeout": 60.0})
        with jobs.service() as service:
            made = {name: service.create("one", NewJob("tune", "tiny", spec)).id for name, spec in specs.items()}
            done = {name: ended(service, job_id) for name, job_id in made.items()}
            told = said(service, made["bridged"])
        fit = {"cloud": server.address, "key": home.key_file, "package": packages["near"], "data": str(runs.texts)}
        alone = TuneConfig.model_validate({**tuning, "package": packages["near"], "out": tmp_path / "plain"})
        run_tuning(alone)
        fitted = run_fit(FitConfig.model_validate({**fit, "text": public, "tokens": 1024, "block": 64}))
        run_tuning(alone.model_copy(update={"out": tmp_path / "bridged"}))
    failed = {
        "nameless": "fetch one by name, with --package: near (split 1:1), whole (split 1:1)",
        "unknown": "near (split 1:1), whole (split 1:1)",
        "shared": "share a run of 13 tokens with private ones",
    }
    for name, why in failed.items():
        error = done[name].error
        assert error is not None
        assert why in error["message"]
    for name in ("plain", "bridged"):
        assert done[name].status == "succeeded", done[name].error
        assert weights(jobs.home.model(result_id(made[name]))) == weights(tmp_path / name / "adapter")
    assert weights(tmp_path / "plain" / "adapter") != weights(tmp_path / "bridged" / "adapter")
    assert any("sends 1,024 tokens of the 40 texts" in line for line in told)
    assert any("Using your own bridge" in line for line in told)
    assert done["bridged"].bytes_up > done["plain"].bytes_up + fitted.bytes_up / 2
    assert not list(jobs.home.job(made["bridged"]).glob("package*"))


@pytest.mark.usefixtures("workers")
def test_a_job_on_a_cloud_without_a_package_fails_in_a_line(runs: Runs, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "home", runs)
    with jobs.service() as service:
        job = ended(service, service.create("one", NewJob("tune", "tiny", {"data": "file-texts"})).id)
    assert job.error is not None
    assert job.error["code"] == RefusedError.exit_code
    assert "the cloud offers no package: ask its owner for one" in job.error["message"]
