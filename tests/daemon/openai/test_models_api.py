"""Models, by the official SDK."""

from __future__ import annotations

import pytest
from openai import NotFoundError, OpenAI, PermissionDeniedError
from support.daemon.openai_fakes import BASE, OpenAIDaemon


def test_base_models_are_listed_and_stay(client: OpenAI) -> None:
    assert client.models.list().data[0].id == BASE
    assert client.models.retrieve(BASE).owned_by == "main"
    with pytest.raises(PermissionDeniedError, match="is a base model"):
        client.models.delete(BASE)
    with pytest.raises(NotFoundError, match="there is no model") as caught:
        client.models.retrieve("gpt-4o/mini")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_an_adapter_is_there_until_it_is_deleted(
    client: OpenAI, openai_daemon: OpenAIDaemon, training_file: str
) -> None:
    job = client.fine_tuning.jobs.create(model=BASE, training_file=training_file, seed=99)
    openai_daemon.jobs.go_on(job.id, steps=[3])
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    name = checkpoint.fine_tuned_model_checkpoint
    assert name.startswith(f"ft:{BASE}:")
    assert client.models.retrieve(name).owned_by == "first"
    folder = openai_daemon.context.home.model(checkpoint.id)
    assert folder.is_dir()
    assert client.models.delete(name).deleted
    assert not folder.exists()
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id)) == []
    for ask in (client.models.retrieve, client.models.delete):
        with pytest.raises(NotFoundError):
            ask(name)
    client.fine_tuning.jobs.cancel(job.id)
