"""Jobs against a real cloud: to the end, with the bits of `isthmus edge train`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.cloud.train_runs import Runs, cloud_for_runs
from support.daemon_jobs import TRAINING, Jobs, ended, jobs_of, said, training

from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.daemon.jobs.job_names import checkpoint_id, result_id

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("warm_children")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    with cloud_for_runs(tmp_path_factory.mktemp("jobs")) as started:
        yield started


@pytest.fixture(scope="module")
def undisturbed(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that `isthmus edge train` makes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    runs.train(out, **TRAINING)
    return (out / "adapter" / ADAPTER_WEIGHTS).read_bytes()


def weights(jobs: Jobs, model_id: str) -> bytes:
    return (jobs.home.model(model_id) / ADAPTER_WEIGHTS).read_bytes()


def test_a_job_ends_with_the_adapter_of_edge_train(runs: Runs, undisturbed: bytes, tmp_path: Path) -> None:
    jobs = jobs_of(tmp_path / "home", runs, save_every=2)
    with jobs.service() as service:
        made = service.create("one", training())
        job = ended(service, made.id)
        assert job.status == "succeeded", said(service, made.id)
        assert (job.step, job.total, job.attempts) == (4, 4, 1)
    assert weights(jobs, result_id(made.id)) == undisturbed
    assert weights(jobs, checkpoint_id(made.id, 2)) != undisturbed
