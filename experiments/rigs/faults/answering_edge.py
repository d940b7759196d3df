"""The edge of the fault benchmark that generates an answer: `isthmus edge generate`'s own path, watched as the one that
trains is."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Final

from isthmus.common.torch_threads import use_threads
from isthmus.edge.cloud_link import open_link
from isthmus.edge.config.client_config import GenerateConfig
from isthmus.edge.generation.generation_run import answer_once
from isthmus.edge.generation.text_generator import text_generator
from isthmus.experiments.harness.processes import Parent, serve
from isthmus.experiments.rigs.faults.fault_edge import watched

MODULE: Final = "isthmus.experiments.rigs.faults.answering_edge"


def main(parent: Parent) -> None:
    """Answer, and write into a file what `isthmus edge generate --json` prints, and `replayed`: token positions that
    were sent again.

    The task's `config` has the fields of `GenerateConfig`, and `prompt`, `out` and `threads`.

    Raises IsthmusError: of whatever kind fits.
    """
    config = dict(parent.task["config"])
    prompt, out, threads = config.pop("prompt"), Path(config.pop("out")), config.pop("threads")
    settings = GenerateConfig(**config)
    use_threads(threads)
    calls, text = 0, io.StringIO()

    def called(_model: object, _inputs: object) -> None:
        nonlocal calls
        calls += 1  # the model is called once for each token, however often its question to the cloud is repeated

    with open_link(settings, interactive=True) as link, text_generator(link, settings, None) as generator:
        generator.model.generation_config.eos_token_id = None  # the faults are spread over all of its tokens
        generator.model.register_forward_pre_hook(called)
        with watched(parent, link, lambda question, phase: calls):
            answer_once(generator, link, prompt, chat=False, as_json=True, out=text)
        out.write_text(json.dumps({**json.loads(text.getvalue()), "replayed": link.span.caches.replayed}))


if __name__ == "__main__":
    serve(main)
