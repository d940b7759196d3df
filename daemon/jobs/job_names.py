"""How jobs, and what they leave, are named.

What a job leaves is named after the job, so that whatever is done again after a crash has its first name again.
"""

from __future__ import annotations

import re
import secrets

JOB = "ftjob-"
MOST_SUFFIX = 64
"""Characters of a suffix."""

_STRANGE = re.compile(r"[^a-z0-9._-]+")


def new_job_id() -> str:
    """An id that no other job has."""
    return f"{JOB}{secrets.token_hex(12)}"


def checkpoint_prefix(job_id: str) -> str:
    """What the ids of a job's checkpoints begin with."""
    return f"ftckpt-{_own(job_id)}-"


def checkpoint_id(job_id: str, step: int) -> str:
    """The id of the adapter as it is after `step` steps."""
    return f"{checkpoint_prefix(job_id)}{step}"


def result_id(job_id: str) -> str:
    """The id of the adapter that a job ends with."""
    return f"ftmodel-{_own(job_id)}"


def result_file_id(job_id: str, number: int) -> str:
    """The id of a job's result file, of which it may have several."""
    return f"file-{_own(job_id)}-{number}"


def suffix_of(text: str) -> str:
    """A suffix as it stands in names: lower case, and `-` for what is neither a letter, a digit, `.`, `_` nor `-`."""
    return _STRANGE.sub("-", text.strip().lower()).strip("-")


def model_name(base: str, suffix: str, job_id: str, step: int | None = None) -> str:
    """The name under which an adapter can be talked to: OpenAI's form, whose part for an organization is empty.

    Args:
        step: Of a checkpoint; None for what the job ends with.
    """
    name = f"ft:{base}::{suffix}:{_own(job_id)[:12]}"
    return name if step is None else f"{name}:ckpt-step-{step}"


def _own(job_id: str) -> str:
    return job_id.removeprefix(JOB)
