"""A daemon's jobs in a process of their own: `python jobs_process.py HOME CLOUD KEY TEXTS SPEC`.

It puts a training with this spec (JSON) into the queue, says its id, and works until its standard input ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from support.daemon.jobs.job_homes import Jobs, training
from support.warm_processes import WarmPopen


def main(home: str, cloud: str, key: str, texts: str, spec: str) -> None:
    """See the top of the file."""
    subprocess.Popen = WarmPopen  # type: ignore[misc]
    jobs = Jobs(Path(home), (cloud, Path(key)), Path(texts), save_every=1)
    with jobs.service() as service:
        print(service.create("one", training(**json.loads(spec))).id, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
