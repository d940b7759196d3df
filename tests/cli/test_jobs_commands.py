"""The commands of jobs, and the API that they use, against a daemon whose workers do what a script says."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.daemon.jobs import scripted_daemon
from support.daemon.running_daemon import RunningDaemon, running_daemon
from typer.testing import CliRunner, Result

from isthmus.cli.main import app
from isthmus.common.errors import ConfigError, DataError, NotRunningError
from isthmus.common.readable import date, moment
from isthmus.daemon.daemon_client import RefusedRequestError

pytestmark = pytest.mark.server

runner = CliRunner()
JOBS = "/isthmus/v1/jobs"
PROGRESS = {"kind": "progress", "step": 3, "total": 12, "speed": 60.0} | dict.fromkeys(
    ("bytes_up", "bytes_down", "calls", "retries"), 0
)
SUCCEEDS = ({"report": PROGRESS}, {"result": "step,train_loss\n1,2.5\n"}, {"end": {"outcome": "succeeded"}})
WAITS = ({"report": PROGRESS}, {"wait": True})
FAILS = ({"end": {"outcome": "failed", "code": 11, "message": "The data are empty.", "passing": False}},)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    home = tmp_path_factory.mktemp("daemon") / "home"
    with running_daemon(home, "jobs_at_once = 8\n" + scripted_daemon.CLOUD, scripted_daemon.__name__) as running:
        yield running


@pytest.fixture
def run(daemon: RunningDaemon) -> Any:
    def run(*words: object, code: int = 0) -> Result:
        done = runner.invoke(app, ["edge", "jobs", *map(str, words), "--home", str(daemon.home.path)])
        assert done.exit_code == code, (done.output, done.exception)
        return done

    return run


def script(folder: Path, *lines: dict[str, Any]) -> Path:
    path = folder / "script.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def submit(run: Any, path: Path, *words: object) -> str:
    told: str = run("submit", "train", "--model", "tiny", "--data", path, *words).stdout.strip()
    return told


def until(
    run: Any, job: str, status: str, also: Callable[[dict[str, Any]], bool] = lambda _tree: True
) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while (tree := json.loads(run("show", job, "--json").stdout))["status"] != status or not also(tree):
        assert time.monotonic() < deadline, tree
        time.sleep(0.02)
    found: dict[str, Any] = tree
    return found


def test_a_job_is_submitted_followed_shown_and_its_result_fetched(run: Any, tmp_path: Path) -> None:
    path = script(tmp_path, *SUCCEEDS)
    settings = tmp_path / "settings.toml"
    settings.write_text('rank = 4\nsteps = 7\nmethod = "lora"\n')
    words = ("--config", settings, "--set", "steps=12", "--set", "text_column=body", "--suffix", "desk")
    followed = run("submit", "train", "--model", "tiny", "--data", path, *words, "--follow").stdout
    assert followed.splitlines()[-1].endswith("The job has successfully completed")
    job = followed.split("job: ")[1].split()[0]
    tree = json.loads(run("show", job, "--json").stdout)
    assert tree["spec"] == {"rank": 4, "steps": 12, "method": "lora", "text_column": "body", "data": str(path)}
    assert (tree["status"], tree["step"], tree["total"]) == ("succeeded", 3, 12)
    assert tree["tuned_model"].startswith("ft:tiny::desk:")
    assert Path(tree["adapter"]).is_dir()
    shown = run("show", job).stdout
    assert tree["tuned_model"] in shown
    assert run("result", job).stdout == "step,train_loss\n1,2.5\n"
    run("result", job, "--out", tmp_path / "figures.csv")
    assert (tmp_path / "figures.csv").read_text() == "step,train_loss\n1,2.5\n"
    events = [json.loads(line) for line in run("follow", job, "--json").stdout.splitlines()]
    assert [f"{moment(event['at'])}  {event['message']}" for event in events] == followed.splitlines()
    assert f"created      {moment(tree['created_at'])}" in shown.splitlines()


def test_a_list_fits_a_terminal(run: Any, tmp_path: Path) -> None:
    job = submit(run, script(tmp_path, *WAITS), "--priority", 3)
    until(run, job, "running", lambda tree: tree["step"] == 3)
    told = run("list").stdout
    (line,) = (line for line in told.splitlines() if line.startswith(job))
    assert line.split()[1:] == ["train", "running", "3/12", "9.0", "minutes"]
    assert max(map(len, told.splitlines())) <= 80
    tree = json.loads(run("list", "--limit", 1, "--json").stdout)[0]
    assert (tree["id"], tree["seconds_left"], tree["priority"]) == (job, 540.0, 3)
    assert 500 < tree["estimated_finish"] - time.time() < 600
    run("cancel", job)


def test_a_job_that_waits_for_its_cloud_says_so(run: Any, daemon: RunningDaemon, tmp_path: Path) -> None:
    since = time.time() - 240
    wait = {"kind": "waiting", "since": since, "until": since + 3600, "reason": "the stream broke"}
    lines = ({"report": PROGRESS}, {"report": wait}, {"wait": True})
    job = submit(run, script(tmp_path, *lines), "--suffix", "a-name-" + "x" * 50)
    tree = until(run, job, "running", lambda tree: tree["waiting"] is not None)
    assert tree["waiting"] == {"cloud": "main", "since": since, "until": since + 3600, "reason": "the stream broke"}
    assert (tree["seconds_left"], tree["estimated_finish"]) == (None, None)
    assert f"the cloud main, since {moment(since)}, until {moment(since + 3600)}: then it is" in run("show", job).stdout
    told = run("list").stdout.splitlines()
    at = next(number for number, line in enumerate(told) if line.startswith(job))
    assert told[at].split()[1:] == ["train", "waiting", "3/12"]
    assert told[at + 1].startswith(f"  {date(tree['created_at'])}  tiny  a-name-xxx")
    assert re.fullmatch(r"  waits for the cloud main, away for \S+ minutes; gives up in \S+ minutes", told[at + 2])
    assert max(map(len, told)) <= 80
    status = runner.invoke(app, ["edge", "daemon", "status", "--home", str(daemon.home.path)]).stdout
    assert f"waits   {job} for the cloud main, since {moment(since)}, until {moment(since + 3600)}: the" in status
    run("cancel", job)


def test_jobs_are_paused_resumed_cancelled_and_retried(run: Any, tmp_path: Path) -> None:
    job = submit(run, script(tmp_path, *WAITS))
    until(run, job, "running")
    for action, status in (("pause", "paused"), ("resume", "running"), ("cancel", "cancelled"), ("retry", "running")):
        run(action, job)
        until(run, job, status)
    refused = run("resume", job, code=1).exception
    assert isinstance(refused, RefusedRequestError)
    assert str(refused) == f"{job} is running and cannot be resumed: that takes a job that is paused"
    run("cancel", job)


def test_a_job_that_has_ended_is_deleted_for_good(run: Any, daemon: RunningDaemon, tmp_path: Path) -> None:
    job = submit(run, script(tmp_path, *WAITS))
    until(run, job, "running")
    refused = run("delete", job, code=1).exception
    assert isinstance(refused, RefusedRequestError)
    assert str(refused).startswith(f"{job} is running and cannot be deleted")
    run("cancel", job)
    until(run, job, "cancelled")
    assert run("delete", job).stdout == f"{job} is deleted\n"
    assert not daemon.home.job(job).exists()
    for words in (("show", job), ("delete", job, "--json")):
        assert f"there is no job '{job}'" in str(run(*words, code=1).exception)


def test_following_a_job_that_fails_ends_with_its_code(run: Any, tmp_path: Path) -> None:
    job = submit(run, script(tmp_path, *FAILS))
    told = run("follow", job, code=11).stdout
    assert told.splitlines()[-1].endswith("The job has failed: The data are empty.")
    assert "The data are empty. (exit code 11)" in run("show", job).stdout
    assert isinstance(run("result", job, code=1).exception, ConfigError)


def test_the_log_of_a_training_is_printed(run: Any, daemon: RunningDaemon, tmp_path: Path) -> None:
    job = submit(run, script(tmp_path, *WAITS))
    until(run, job, "running")
    log = daemon.home.job(job) / "run" / "losses.jsonl"
    log.parent.mkdir()
    lines = [{"step": step, "loss": 2.0 / step, "learning_rate": 1e-3} for step in range(1, 1101)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11')
    assert json.loads(run("steps", job, "--json").stdout) == lines
    assert run("steps", job, "--after", 1099).stdout == "step   1100  loss 0.0018  rate 0.001\n"
    run("cancel", job)


def test_a_mistake_is_one_line(run: Any, tmp_path: Path) -> None:
    path = script(tmp_path, *SUCCEEDS)
    for words, text in (
        (("submit", "train", "--model", "huge", "--data", path), "no cloud serves the model 'huge'"),
        (("submit", "train", "--model", "tiny"), "'data' is missing"),
        (("submit", "trian", "--model", "tiny"), "kind: 'trian' is none of 'train', 'tune', 'evaluate' or 'generate'"),
        (("submit", "x" * 9999, "--model", "tiny"), "xxx… is none of 'train'"),
        (("submit", "train", "--model", "tiny", "--data", path, "--set", "rnak=3"), "did you mean 'rank'"),
        (("submit", "train", "--model", "tiny", "--data", path, "--set", "rank"), "write NAME=VALUE"),
        (("show", "ftjob-0"), "there is no job 'ftjob-0'"),
    ):
        error = run(*words, code=1).exception
        assert isinstance(error, ConfigError)
        assert text in str(error)
        assert "\n" not in str(error)
    missing = run("submit", "train", "--model", "tiny", "--data", "missing.jsonl", code=1).exception
    assert isinstance(missing, DataError)
    assert "'missing.jsonl' is no file here" in str(missing)


def test_where_no_daemon_runs_it_is_said(tmp_path: Path) -> None:
    for words in (["list"], ["show", "x"], ["submit", "train", "--model", "tiny"], ["follow", "x"]):
        done = runner.invoke(app, ["edge", "jobs", *words, "--home", str(tmp_path)])
        assert isinstance(done.exception, NotRunningError)
        assert "isthmus edge daemon start" in str(done.exception)


# Over the network, where a token is all that one has ------------------------------------------------------------------


def test_paths_are_taken_over_the_socket_alone(daemon: RunningDaemon, tmp_path: Path) -> None:
    path = script(tmp_path, *SUCCEEDS)
    for spec in ({"data": str(path)}, {"data": "hub:somebody/texts"}, {"data": "file-0", "start_from": "/adapter"}):
        answer = daemon.post(JOBS, json={"kind": "train", "model": "tiny", "spec": spec})
        assert answer.status_code == 400
        assert "over the Unix socket alone" in answer.json()["error"]["message"]
    answer = daemon.post(JOBS, json={"kind": "train", "model": "tiny", "spec": {"data": "file-0"}})
    assert "there is no such file" in answer.json()["error"]["message"]


def test_another_owner_finds_no_job(daemon: RunningDaemon, run: Any, tmp_path: Path) -> None:
    job = submit(run, script(tmp_path, *SUCCEEDS))
    until(run, job, "succeeded")
    done = runner.invoke(app, ["edge", "daemon", "token", "other", "--home", str(daemon.home.path)])
    token = done.stdout.strip()
    time.sleep(1.1)  # owners are read anew once a second
    for way in ("", "/events", "/checkpoints", "/steps", "/result"):
        assert daemon.get(f"{JOBS}/{job}{way}").status_code == 200
        assert daemon.get(f"{JOBS}/{job}{way}", token=token).status_code == 404
    assert daemon.post(f"{JOBS}/{job}/cancel", token=token).status_code == 404
    assert daemon.get(JOBS, token=token).json() == {"jobs": [], "has_more": False}


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "train", "model": "tiny", "spec": {}, "strange": 1},
        {"kind": "dance", "model": "tiny", "spec": {}},
        {"kind": "train", "model": "tiny", "spec": {"data": "file-0"}, "priority": 101},
        {"kind": "train", "model": "tiny", "spec": {"data": "file-0"}, "suffix": "x" * 65},
        {"kind": "train", "model": "x" * 300, "spec": {"data": "file-0"}},
    ],
)
def test_a_body_that_makes_no_sense_is_refused(daemon: RunningDaemon, body: dict[str, Any]) -> None:
    assert daemon.post(JOBS, json=body).status_code == 400


@pytest.mark.parametrize("value", [r'"\ud800"', "1e999", "NaN", '{"a": 1, "a": 2}', '{"\\udc00": 1}'])
@pytest.mark.parametrize("where", ["spec", "labels", "suffix"])
def test_what_could_not_be_told_again_is_refused(daemon: RunningDaemon, where: str, value: str) -> None:
    whole = {"spec": '{"data": "file-0"}', "labels": "{}", "suffix": '""'}
    whole[where] = value if where == "suffix" else f'{{"data": {value}}}'
    body = ", ".join(f'"{name}": {text}' for name, text in whole.items())
    answer = daemon.post(JOBS, content=f'{{"kind": "train", "model": "tiny", {body}}}')
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_a_whole_surrogate_pair_is_a_character(daemon: RunningDaemon) -> None:
    body = r'{"kind": "train", "model": "tiny", "spec": {"data": "file-0"}, "suffix": "\ud83d\ude00"}'
    answer = daemon.post(JOBS, content=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] != "invalid_json"


def test_lists_go_by_pages(daemon: RunningDaemon, run: Any, tmp_path: Path) -> None:
    made = [submit(run, script(tmp_path, *SUCCEEDS), "--set", f"seed={n}") for n in range(3)][::-1]
    first = daemon.get(JOBS, params={"limit": 2}).json()
    assert [job["id"] for job in first["jobs"]] == made[:2]
    assert first["has_more"]
    rest = daemon.get(JOBS, params={"limit": 2, "after": made[1], "kind": "train"}).json()
    assert rest["jobs"][0]["id"] == made[2]
    assert daemon.get(JOBS, params={"kind": "tune"}).json()["jobs"] == []
    assert daemon.get(JOBS, params={"limit": 0}).status_code == 400
    assert daemon.get(JOBS, params={"after": "ftjob-0"}).status_code == 404
