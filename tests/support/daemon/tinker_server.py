"""A daemon of Tinker's API alone, in a process of its own, with stand-ins for what trains and what generates.

    python tests/support/daemon/tinker_server.py HOME PORT [--forgetful]

`--forgetful` makes a server that keeps no table of promises: a request that comes again is done again. Where
$REAL_CLOUD has the settings of a cloud, as JSON, that one is trained with, by what trains in truth.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from sqlalchemy.orm import Session

from isthmus.daemon.daemon_settings import DaemonSettings
from isthmus.daemon.disk_room import DiskRoom
from isthmus.daemon.home import Home
from isthmus.daemon.serving.answers import Piece, Prompt, Sampling, Target, TokenChance
from isthmus.daemon.state.database import Database
from isthmus.daemon.state.owners import first_owner, give_token
from isthmus.daemon.state.tables import BaseModel
from isthmus.daemon.tinker.promises import NewPromise, Promises
from isthmus.daemon.tinker.tinker_routes import router
from isthmus.daemon.tinker.tinker_service import TinkerService
from isthmus.daemon.tinker.training_queue import MODULE
from isthmus.daemon.web.application import application
from isthmus.daemon.web.context import Context
from isthmus.daemon.workers.asking import WorkerError

BASE = "org/tiny"
END = 2
WORDS = ("[UNK]", "hello", "[END]", *(f"w{number}" for number in range(3, 100)))
TOKENIZER = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {"type": "Whitespace"},
    "post_processor": None,
    "decoder": None,
    "model": {"type": "WordLevel", "vocab": {word: id for id, word in enumerate(WORDS)}, "unk_token": "[UNK]"},
}


class FakeAnswers:
    """Says the prompt's last token plus 1, 2, 3, … until a stop token; an adapter's number is its log probability."""

    async def generate(self, target: Target, prompt: Prompt, sampling: Sampling, *, owner: str) -> AsyncIterator[Piece]:
        assert not isinstance(prompt, str)
        assert owner
        tokens = [int(token) for token in prompt]  # type: ignore[call-overload]
        if len(tokens) > 1000:
            raise WorkerError("the prompt has more tokens than the model takes", 10)
        weight = 0.25
        if target.adapter is not None:
            weight = json.loads((Path(target.adapter) / "state.json").read_text())["weight"]
        known = [None, *(_chance(token, -weight) for token in tokens[1:])] if sampling.prompt_logprobs else ()
        for index in range(sampling.n):
            for count in range(sampling.max_tokens or 8):
                token = (tokens[-1] + 1 + count + index) % len(WORDS)
                stop = [token] in [list(sequence) for sequence in sampling.stop_tokens] or token == END
                last = stop or count + 1 == (sampling.max_tokens or 8)
                yield Piece(
                    index,
                    WORDS[token],
                    [token],
                    [_chance(token, -weight)],
                    ("stop" if stop else "length") if last else None,
                    len(tokens) if count == 0 else None,
                    known if count == 0 else (),
                )
                if last:
                    break

    async def tokenizer_files(self, base: str) -> Mapping[str, bytes]:
        assert base == BASE
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]", "eos_token": "[END]"}
        return {"tokenizer.json": json.dumps(TOKENIZER).encode(), "tokenizer_config.json": json.dumps(config).encode()}


def _chance(token: int, logprob: float) -> TokenChance:
    likeliest = [(other, WORDS[other], WORDS[other].encode(), logprob - other) for other in range(3)]
    return TokenChance(token, WORDS[token], WORDS[token].encode(), logprob, likeliest)


class ForgetfulPromises(Promises):
    """A server's without memory: every request is a new one."""

    count = 0

    def make(self, new: NewPromise, also: Any = None) -> Any:
        self.count += 1
        return super().make(replace(new, key=f"{new.key}/{self.count}"), also)


def main(home_path: str, port: str, *flags: str) -> None:
    home = Home.make(Path(home_path))
    real = os.environ.get("REAL_CLOUD")
    cloud = {"cloud": "isthmus://127.0.0.1:1#SHA256:0"} if real is None else json.loads(real)
    settings = DaemonSettings.model_validate(
        {"listen": f"127.0.0.1:{port}", "clouds": {"main": cloud}, "body_mib": 1, "adapters_hot": 2}
    )
    database = Database(home.database)
    first_owner(database, home.token)
    second = home.path / "second-token"
    if not second.exists():
        second.write_text(give_token(database, "second"))
    with database.session() as session:
        _know_model(session)
    context = Context(settings, home, database, None, FakeAnswers(), DiskRoom(home.path, settings.disk_gib))  # type: ignore[arg-type]
    app = application(context, [router()])

    def make(context: Context) -> TinkerService:
        service = TinkerService(context, "support.daemon.fake_trainer" if real is None else MODULE)
        if "--forgetful" in flags:
            service.promises.__class__ = ForgetfulPromises
        return service

    app.state.make_tinker = make
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", timeout_graceful_shutdown=1)


def _know_model(session: Session) -> None:
    facts = {"longest": 1000, "digest": "0" * 64}
    session.merge(BaseModel(name=BASE, cloud="main", facts=facts, seen_at=0.0))


if __name__ == "__main__":
    main(*sys.argv[1:])
