"""Jobs whose workers do what a script says; see `scripted_worker`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.daemon.jobs.job_homes import Jobs

from isthmus.daemon.jobs.job_runner import Patience
from isthmus.daemon.jobs.job_service import NewJob

SUCCEEDS = ({"result": "step\n"}, {"end": {"outcome": "succeeded"}})
WAITS = ({"wait": True},)
AWAY = {"end": {"outcome": "failed", "code": 40, "message": "It is away.", "passing": True}}
QUICK = Patience(first=0.05, longest=0.1, in_all=3600)


def jobs_in(folder: Path, **settings: Any) -> Jobs:
    texts = folder / "texts.jsonl"
    texts.write_text("")
    return Jobs(folder / "home", ("isthmus://localhost:1#SHA256:0", folder / "key"), texts, **settings)


def does(jobs: Jobs, *lines: dict[str, Any], name: str = "script", **values: Any) -> NewJob:
    """A job whose worker does this."""
    script = jobs.home.path / f"{name}.jsonl"
    script.write_text("".join(json.dumps(line) + "\n" for line in lines))
    jobs.upload(f"file-{name}", script)
    return NewJob("train", "tiny", {"data": f"file-{name}"}, **values)


def progress(step: int, **values: int) -> dict[str, Any]:
    crossed = dict.fromkeys(("bytes_up", "bytes_down", "calls", "retries"), 0) | values
    return {"report": {"kind": "progress", "step": step, "total": 10, "speed": 0.5, **crossed}}


def checkpoint(step: int) -> list[dict[str, Any]]:
    return [
        {"model": f"ftckpt-JOB-{step}"},
        {"report": {"kind": "checkpoint", "id": f"ftckpt-JOB-{step}", "step": step, "metrics": {"step": step}}},
    ]
