"""Fine-tuning jobs, by the official SDK."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from openai import BadRequestError, NotFoundError, OpenAI
from support.daemon.openai_fakes import BASE, OpenAIDaemon

from isthmus.daemon.jobs.job_service import NewJob
from isthmus.daemon.openai import job_objects
from isthmus.daemon.state.tables import Job


@pytest.fixture(autouse=True)
def no_jobs(openai_daemon: OpenAIDaemon) -> None:
    """Each test begins without jobs."""
    openai_daemon.jobs.forget()


def row(openai_daemon: OpenAIDaemon, job_id: str) -> Job:
    return openai_daemon.jobs.get(openai_daemon.owner.id, job_id)


def test_a_job_has_what_was_asked_for(client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str) -> None:
    numbers = {"batch_size": 12, "learning_rate_multiplier": 0.5, "n_epochs": 2}
    job = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training_file,
        validation_file=training_file,
        suffix="my-model_2.0",
        seed=7,
        metadata={"team": "a"},
        method={"type": "supervised", "supervised": {"hyperparameters": numbers}},  # type: ignore[arg-type]
        integrations=[],
    )
    assert (job.status, job.seed, job.metadata, job.model) == ("queued", 7, {"team": "a"}, BASE)
    assert (job.training_file, job.validation_file) == (training_file, training_file)
    assert job.hyperparameters.to_dict() == numbers
    assert job.method is not None
    assert job.method.supervised is not None
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    kept = row(openai_daemon, job.id)
    assert (kept.kind, kept.model, kept.suffix) == ("train", BASE, "my-model_2.0")
    assert kept.spec == {
        "data": training_file, "validation": training_file, "format": "jsonl", "seed": 7, "max_length": 256,
        "epochs": 2, "batch": 6, "accumulate": 2, "learning_rate": 5e-4,
    }  # fmt: skip


def test_auto_and_the_older_place_of_hyperparameters(
    client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str
) -> None:
    job = client.fine_tuning.jobs.create(
        model=BASE, training_file=training_file, hyperparameters={"n_epochs": 3, "batch_size": "auto"}
    )
    assert job.hyperparameters.to_dict() == {"batch_size": 4, "learning_rate_multiplier": 1.0, "n_epochs": 3}
    by_default = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    assert by_default.hyperparameters.n_epochs == 10  # ten examples
    assert row(openai_daemon, by_default.id).spec["validation_split"] == 0
    assert 0 <= by_default.seed < 2**31


def test_the_emulator_mode_leaves_to_the_package_what_is_not_said(
    client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str
) -> None:
    labels = {"mode": "emulator", "team": "a"}
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file, metadata=labels, seed=7)
    auto = {"batch_size": 4, "learning_rate_multiplier": "auto", "n_epochs": "auto"}
    assert (job.metadata, job.hyperparameters.to_dict()) == (labels, auto)
    assert job.to_dict()["isthmus"]["mode"] == "emulator"  # type: ignore[index]
    kept = row(openai_daemon, job.id)
    assert (kept.kind, kept.spec) == (
        "tune",
        {
            **{"data": training_file, "validation_split": 0, "format": "jsonl", "seed": 7, "max_length": 256},
            **{"batch": 4, "accumulate": 1},
        },
    )
    numbers = {"n_epochs": 2, "learning_rate_multiplier": 0.5}
    said = client.fine_tuning.jobs.create(
        model=BASE,
        training_file=training_file,
        metadata=labels,
        hyperparameters=numbers,  # type: ignore[arg-type]
    )
    assert said.hyperparameters.to_dict() == {"batch_size": 4, **numbers}
    spec = row(openai_daemon, said.id).spec
    assert (spec["epochs"], spec["learning_rate"]) == (2, 5e-4)
    more = {"package": "near", "public_file": training_file, "leave_out_shared": "true"}
    bridged, split = (
        client.fine_tuning.jobs.create(model=BASE, training_file=training_file, metadata={"mode": mode, **more})
        for mode in ("emulator", "split")
    )
    spec = row(openai_daemon, bridged.id).spec
    assert (spec["package"], spec["public"], spec["leave_out_shared"]) == ("near", training_file, True)
    assert row(openai_daemon, split.id).kind == "train"  # where the others are labels like any
    assert not {"package", "public", "leave_out_shared"} & row(openai_daemon, split.id).spec.keys()
    assert [each.id for each in client.fine_tuning.jobs.list()] == [split.id, bridged.id, said.id, job.id]


def test_a_file_is_not_read_again_for_a_job(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    made = [
        client.files.create(file=("a.jsonl", b'{"text": "one"}\n' * examples), purpose="fine-tune").id
        for examples in (20, 40)
    ]
    for file_id in made:
        openai_daemon.context.home.file(file_id).write_bytes(b"")
    jobs = [client.fine_tuning.jobs.create(model=BASE, training_file=file_id) for file_id in made]
    assert [job.hyperparameters.n_epochs for job in jobs] == [5, 3]


def test_the_same_body_is_one_job(client: OpenAI, training_file: str) -> None:
    first, again = (client.fine_tuning.jobs.create(model=BASE, training_file=training_file) for _ in range(2))
    assert (first.id, first.seed) == (again.id, again.seed)
    assert client.fine_tuning.jobs.create(model=BASE, training_file=training_file, seed=1).id != first.id


@pytest.mark.parametrize(
    ("options", "param", "error"),
    [
        ({"method": {"type": "dpo"}}, "method.type", "only supervised"),
        ({"method": {"type": "reinforcement"}}, "method.type", "only supervised"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo", "only supervised"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations", "other services"),
        ({"hyperparameters": {"n_epoch": 3}}, "hyperparameters.n_epoch", "unknown field"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "from 1 to 50"),
        ({"hyperparameters": {"n_epochs": 2.0}}, "hyperparameters.n_epochs", "from 1 to 50"),
        ({"hyperparameters": {"batch_size": "2"}}, "hyperparameters.batch_size", "from 1 to 256"),
        ({"hyperparameters": {"learning_rate_multiplier": 0}}, "hyperparameters.learning_rate_multiplier", "0.000001"),
        ({"hyperparameters": {"learning_rate_multiplier": 5e-324}}, "hyperparameters.learning_rate_multiplier", "from"),
        ({"extra_body": {".": 1}}, ".", "unknown field '.'"),
        ({"hyperparameters": {}, "method": {"type": "supervised"}}, "hyperparameters", "in method alone"),
        ({"suffix": "x" * 65}, "suffix", "64"),
        ({"suffix": "a:b"}, "suffix", "pattern"),
        ({"seed": -1}, "seed", "greater"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16 pairs"),
        ({"metadata": {"a": "x" * 513}}, "metadata", "512"),
        ({"metadata": {"mode": "emulater"}}, "metadata", "give split or emulator"),
        ({"metadata": {"mode": "emulator", "public_file": "file-0"}}, "metadata", "'file-0' is no file"),
        ({"metadata": {"mode": "emulator", "leave_out_shared": "yes"}}, "metadata", '"true" or "false"'),
        ({"metadata": {"mode": "emulator", "package": "-x"}}, None, "package = '-x': a package's name has"),
        ({"extra_body": {"learning_rate": 1}}, "learning_rate", "unknown field"),
        ({"training_file": "file-0"}, "training_file", "is no file"),
        ({"validation_file": "file-0"}, "validation_file", "is no file"),
    ],
)
def test_what_is_not_done_is_refused_by_name(
    client: OpenAI, training_file: str, options: dict[str, Any], param: str, error: str
) -> None:
    with pytest.raises(BadRequestError, match=error) as caught:
        client.fine_tuning.jobs.create(**{"model": BASE, "training_file": training_file, **options})
    assert caught.value.param == param
    assert client.fine_tuning.jobs.list().data == []


def test_a_file_of_another_purpose_is_refused(client: OpenAI) -> None:
    file = client.files.create(file=b"1", purpose="batch")
    with pytest.raises(BadRequestError, match="has the purpose 'batch'"):
        client.fine_tuning.jobs.create(model=BASE, training_file=file.id)
    client.files.delete(file.id)


def test_states_go_as_they_may(client: OpenAI, training_file: str) -> None:
    jobs = client.fine_tuning.jobs
    job = jobs.create(model=BASE, training_file=training_file)
    with pytest.raises(BadRequestError, match="takes a job that is paused") as caught:
        jobs.resume(job.id)
    assert caught.value.code == "wrong_state"
    paused = jobs.pause(job.id)
    assert paused.status == "queued"  # the SDK's type has no "paused"
    nothing = {"mode": "split", "step": 0, "total": None, "bytes_up": 0, "bytes_down": 0}
    assert paused.to_dict()["isthmus"] == {"status": "paused", **nothing}
    assert jobs.list_events(job.id).data[0].message == "The job is paused before it has begun"
    assert jobs.resume(job.id).to_dict()["isthmus"]["status"] == "queued"  # type: ignore[index]
    cancelled = jobs.cancel(job.id)
    assert (cancelled.status, cancelled.finished_at is not None) == ("cancelled", True)
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(BadRequestError):
            change(job.id)


def test_lists_come_in_pages_and_by_metadata(client: OpenAI, training_file: str) -> None:
    jobs = client.fine_tuning.jobs
    made = [
        jobs.create(model=BASE, training_file=training_file, seed=n, metadata={"k": str(n % 2), "of": "it"}).id
        for n in range(4)
    ]
    plain = jobs.create(model=BASE, training_file=training_file).id
    assert [job.id for job in jobs.list(limit=2)] == [plain, *made[::-1]]
    page = jobs.list(limit=2, after=made[3])
    assert ([job.id for job in page.data], page.has_more) == ([made[2], made[1]], True)
    assert [job.id for job in jobs.list(metadata={"k": "1"})] == [made[3], made[1]]
    assert [job.id for job in jobs.list(metadata={"k": "1", "of": "other"})] == []
    assert [job.id for job in jobs.list(extra_query={"metadata": "null"})] == [plain]
    with pytest.raises(BadRequestError, match="is not in this list"):
        jobs.list(after="ftjob-0")
    with pytest.raises(BadRequestError, match="each key once"):
        jobs.list(extra_query={"metadata[a][b]": "c"})
    with pytest.raises(BadRequestError, match="unknown field 'colour'"):
        jobs.list(extra_query={"colour": "red"})


def test_events_and_checkpoints(
    client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_objects, "time", SimpleNamespace(time=lambda: 1000.0))
    jobs = client.fine_tuning.jobs
    job = jobs.create(model=BASE, training_file=training_file)
    assert jobs.checkpoints.list(job.id).data == []
    openai_daemon.jobs.go_on(job.id, steps=[20, 40], total=100, speed=2.0)
    events = list(jobs.list_events(job.id, limit=2))
    assert [event.message for event in events] == [
        "Checkpoint created at step 40", "step 40", "Checkpoint created at step 20", "step 20", "The job has begun",
        f"Created fine-tuning job: {job.id}",
    ]  # fmt: skip
    assert (events[1].type, events[1].data) == ("metrics", {"step": 40, "train_loss": 0.05})
    checkpoints = list(jobs.checkpoints.list(job.id, limit=1))
    assert [each.step_number for each in checkpoints] == [40, 20]
    assert checkpoints[0].metrics.to_dict() == {"step": 40, "train_loss": 0.05}
    running = jobs.retrieve(job.id)
    assert (running.status, running.fine_tuned_model) == ("running", None)
    assert running.estimated_finish == 1000 + (100 - 40) * 2
    openai_daemon.jobs.go_on(job.id, waiting={"since": 900.0, "until": 1500.0, "reason": "it broke"})
    waiting = jobs.retrieve(job.id)
    assert (waiting.status, waiting.estimated_finish) == ("running", None)
    told = {"cloud": "main", "since": 900.0, "until": 1500.0, "reason": "it broke"}
    nothing = {"mode": "split", "step": 0, "total": None, "bytes_up": 0, "bytes_down": 0}
    assert waiting.to_dict()["isthmus"] == {"status": "running", **nothing, "waiting": told}
    assert jobs.list().data == [waiting]
    openai_daemon.jobs.end(job.id)
    done = jobs.retrieve(job.id)
    assert (done.status, done.estimated_finish) == ("succeeded", None)
    assert client.files.content(done.result_files[0]).read() == b"step\n"
    assert done.fine_tuned_model in [model.id for model in client.models.list()]
    assert jobs.list().data == [done]


def test_a_failed_job_says_why(client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    openai_daemon.jobs.end(job.id, code=50, message="a loss is NaN")
    failed = client.fine_tuning.jobs.retrieve(job.id)
    assert failed.error is not None
    assert (failed.error.code, failed.error.message, failed.hyperparameters.n_epochs) == (
        "isthmus_50",
        "a loss is NaN",
        10,
    )


def test_tuning_goes_on_from_an_adapter(client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    openai_daemon.jobs.end(job.id)
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert name is not None
    second = client.fine_tuning.jobs.create(model=name, training_file=training_file)
    assert second.model == name
    kept = row(openai_daemon, second.id)
    assert (kept.model, kept.spec["start_from"]) == (BASE, name)
    with pytest.raises(BadRequestError, match=f"the job {second.id} goes on from"):
        client.models.delete(name)
    client.fine_tuning.jobs.cancel(second.id)
    assert client.models.delete(name).deleted
    with pytest.raises(NotFoundError, match="there is no model"):
        client.fine_tuning.jobs.create(model=name, training_file=training_file)


def test_jobs_of_the_command_line_are_in_the_same_list(client: OpenAI, openai_daemon: OpenAIDaemon) -> None:
    owner, spec = openai_daemon.owner.id, {"data": "/data/mine.csv", "steps": 20, "batch": 300}
    train = openai_daemon.jobs.create(owner, NewJob("train", BASE, spec, {"n": 1}))
    generate = openai_daemon.jobs.create(owner, NewJob("generate", BASE, {"prompts": "/data/mine.jsonl"}, {"n": 2}))
    assert [job.training_file for job in client.fine_tuning.jobs.list()] == ["/data/mine.csv"]
    assert client.fine_tuning.jobs.retrieve(train.id).hyperparameters.n_epochs is None
    for ask in (client.fine_tuning.jobs.retrieve, client.fine_tuning.jobs.cancel, client.fine_tuning.jobs.list_events):
        with pytest.raises(NotFoundError, match="its kind is generate"):
            ask(generate.id)


def test_another_owner_sees_none_of_it(client: OpenAI, other: OpenAI, openai_daemon: OpenAIDaemon,
                                       training_file: str) -> None:  # fmt: skip
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file)
    openai_daemon.jobs.end(job.id)
    name = client.fine_tuning.jobs.retrieve(job.id).fine_tuned_model
    assert name is not None
    jobs = other.fine_tuning.jobs
    assert jobs.list().data == []
    for ask in (jobs.retrieve, jobs.cancel, jobs.pause, jobs.resume, jobs.list_events, jobs.checkpoints.list):
        with pytest.raises(NotFoundError):
            ask(job.id)
    assert [model.id for model in other.models.list()] == [BASE]
    for ask in (other.models.retrieve, other.models.delete):
        with pytest.raises(NotFoundError):
            ask(name)
    with pytest.raises(NotFoundError):
        other.chat.completions.create(model=name, messages=[{"role": "user", "content": "hi"}])
    assert client.models.retrieve(name).id == name
