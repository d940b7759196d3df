"""How many workers a cloud has at least and at most, in a file of the owner's folder that a new controller reads."""

from __future__ import annotations

import json
from pathlib import Path

from isthmus.cloud.cluster.cluster_spec import ClusterSpec
from isthmus.common.files import write_atomic
from isthmus.protocol.limits import MAX_WORKERS


def counts_file(spec: ClusterSpec) -> Path:
    """Where the numbers are kept that `scale` was told."""
    return Path(spec.home) / f"cluster-{spec.cloud}.json"


def read_counts(spec: ClusterSpec) -> tuple[int, int]:
    """The least and the largest number: as the cloud was scaled last, or as it was made."""
    usual = spec.least, spec.most
    try:
        known = json.loads(counts_file(spec).read_bytes())
        least, most = int(known["least"]), int(known["most"])
    except (OSError, ValueError, KeyError, TypeError):
        return usual
    return (least, most) if 1 <= least <= most <= MAX_WORKERS and not spec.stages else usual


def write_counts(spec: ClusterSpec, least: int, most: int) -> None:
    """Keep the numbers, until `forget_counts`."""
    write_atomic(counts_file(spec), json.dumps({"least": least, "most": most}).encode(), 0o600)


def forget_counts(spec: ClusterSpec) -> None:
    """Have as many workers as the cloud was made with, the next time that it starts."""
    counts_file(spec).unlink(missing_ok=True)
