"""What somebody does with OpenAI's SDK, from a file to a tuned model, with a daemon that is killed in between."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import NotFoundError, OpenAI
from openai.types.fine_tuning import FineTuningJob
from support.cloud.clouds import Home as CloudHome, ThreadServer, served
from support.daemon import warm_daemon
from support.models.writing_model import writing_checkpoint
from support.warm_processes import WarmPopen

from isthmus.common.torch_threads import torch_threads

pytestmark = pytest.mark.server
STEPS = 120
SECONDS = 60.0


class Daemon:
    """A daemon in a process of its own, which can be killed."""

    def __init__(self, home: Path, cloud: ThreadServer) -> None:
        self._home = home
        home.mkdir(mode=0o700)
        settings = {"cloud": cloud.address, "key": str(cloud.home.key_file)}
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        text = "\n".join(["save_every = 10", "checkpoints_per_job = 100", "[clouds.main]", *lines])
        (home / "daemon.toml").write_text(text, encoding="utf-8")
        self.client = self.start()

    def start(self) -> OpenAI:
        """Start it; gives the SDK."""
        words = ("start", "--home", str(self._home), "--listen", "127.0.0.1:0")
        command = [sys.executable, warm_daemon.__file__, *words]
        self.process = WarmPopen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        record = self._home / "daemon.json"

        def ready() -> bool:
            assert self.process.poll() is None, self._log()
            return record.exists() and json.loads(record.read_bytes())["pid"] == self.process.pid

        until(ready)
        token = (self._home / "token").read_text(encoding="utf-8").strip()
        url = f"{json.loads(record.read_bytes())['url']}/v1"
        return OpenAI(base_url=url, api_key=token, max_retries=0, _strict_response_validation=True)

    def kill(self) -> None:
        """End it as `kill -9` does, which gives it no moment to save anything."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def _log(self) -> str:
        return (self._home / "daemon.log").read_text(encoding="utf-8")


def until(happened: Callable[[], Any]) -> Any:
    """Look again and again until something is so; gives it."""
    deadline = time.monotonic() + SECONDS
    while not (found := happened()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir(mode=0o700)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model = writing_checkpoint("llama", tmp_path / "model")
    with torch_threads(1), ThreadServer(served(model, tmp_path / "parts"), CloudHome(tmp_path)) as cloud:
        running = Daemon(tmp_path / "d", cloud)
        try:
            yield running
        finally:
            running.kill()


def test_from_a_file_to_a_tuned_model(daemon: Daemon) -> None:
    client = daemon.client
    base = until(lambda: client.models.list().data)[0].id
    before = ask(client, base)
    file = client.files.create(file=("chats.jsonl", chats()), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=base, training_file=file.id, validation_file=file.id, suffix="story", seed=1,
        method={"type": "supervised", "supervised": {"hyperparameters": {"batch_size": 2, "n_epochs": STEPS // 10}}},
    )  # fmt: skip
    checkpoint = until(lambda: client.fine_tuning.jobs.checkpoints.list(job.id).data)[0]
    assert 0 < checkpoint.step_number < STEPS
    assert ask(client, checkpoint.fine_tuned_model_checkpoint).isalpha()
    assert client.models.delete(checkpoint.fine_tuned_model_checkpoint).deleted
    spare, waiting, cancelled = tidied(client, base, file.id, job.id)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "running"
    daemon.kill()

    client = daemon.start()
    assert client.fine_tuning.jobs.retrieve(job.id).status in ("queued", "running")
    client.fine_tuning.jobs.pause(job.id)
    until(lambda: told(client.fine_tuning.jobs.retrieve(job.id)) == "paused")
    assert told(client.fine_tuning.jobs.retrieve(waiting)) == "paused"  # since before
    for each in (job.id, waiting):
        assert told(client.fine_tuning.jobs.resume(each)) == "queued"
    assert client.fine_tuning.jobs.cancel(waiting).status == "cancelled"
    with pytest.raises(NotFoundError):
        client.files.retrieve(spare)
    with pytest.raises(NotFoundError):
        client.models.retrieve(checkpoint.fine_tuned_model_checkpoint)

    done = until(lambda: ended(client, job.id))
    assert (done.status, done.error) == ("succeeded", None)
    assert steps_of(client, done) == list(range(1, STEPS + 1))
    assert paged(client.fine_tuning.jobs.list) == [cancelled, waiting, job.id]
    assert paged(client.files.list) == [*done.result_files, file.id]
    assert len(paged(client.fine_tuning.jobs.list_events, job.id, limit=7)) > STEPS
    checkpoints = paged(client.fine_tuning.jobs.checkpoints.list, job.id)
    assert checkpoint.id not in checkpoints
    assert len(checkpoints) >= STEPS // 10 - 2
    name = done.fine_tuned_model
    assert name is not None
    assert name.startswith(f"ft:{base}::story:")
    chunks = list(client.chat.completions.create(model=name, messages=question(), stream=True, **greedy()))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ask(client, name)
    assert ask(client, name) != ask(client, base) == before
    assert client.models.delete(name).deleted
    with pytest.raises(NotFoundError):
        ask(client, name)
    assert client.files.delete(file.id).deleted
    assert paged(client.files.list) == done.result_files


def tidied(client: OpenAI, base: str, file: str, job: str) -> tuple[str, str, str]:
    """Page, pause, resume, cancel and delete while a job runs; gives a deleted file, a paused and a cancelled job."""
    jobs = client.fine_tuning.jobs
    waiting, cancelled = (jobs.create(model=base, training_file=file, seed=seed).id for seed in (2, 3))
    assert told(jobs.pause(waiting)) == "paused"
    assert told(jobs.resume(waiting)) == "queued"
    assert told(jobs.pause(waiting)) == "paused"
    assert jobs.cancel(cancelled).status == "cancelled"
    assert paged(jobs.list) == [cancelled, waiting, job]
    assert paged(jobs.list_events, cancelled) == [event.id for event in jobs.list_events(cancelled).data]
    spare = client.files.create(file=("spare.jsonl", chats()), purpose="fine-tune").id
    assert paged(client.files.list) == [spare, file]
    assert client.files.delete(spare).deleted
    assert paged(client.files.list) == [file]
    return spare, waiting, cancelled


def paged(list_: Callable[..., Any], *of: str, limit: int = 1) -> list[str]:
    """The ids of a list: the SDK's pages, by itself and by `after`, hold what one large page holds."""
    whole = [each.id for each in list_(*of, limit=1000).data]
    assert [each.id for each in list_(*of, limit=limit)] == whole
    assert [each.id for each in list_(*of, limit=limit, after=whole[0])] == whole[1:]
    return whole


def told(job: FineTuningJob) -> Any:
    """A job's state in the daemon's own words, which have "paused"."""
    values: Any = job.to_dict()["isthmus"]
    return values["status"]


def chats() -> bytes:
    lines = [{"messages": [*question(), {"role": "assistant", "content": "yes" * (n % 3 + 1)}]} for n in range(20)]
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def question() -> Any:
    return [{"role": "user", "content": "Are you there?"}]


def greedy() -> Any:
    return {"temperature": 0, "max_tokens": 8}


def ask(client: OpenAI, model: str) -> str:
    answer = client.chat.completions.create(model=model, messages=question(), **greedy())
    return answer.choices[0].message.content or ""


def ended(client: OpenAI, job_id: str) -> FineTuningJob | None:
    job = client.fine_tuning.jobs.retrieve(job_id)
    return job if job.status in ("succeeded", "failed", "cancelled") else None


def steps_of(client: OpenAI, job: FineTuningJob) -> list[int]:
    """The steps in a job's file of metrics."""
    text = client.files.content(job.result_files[0]).read().decode()
    return [int(row["step"]) for row in csv.DictReader(io.StringIO(text)) if row["train_loss"]]
