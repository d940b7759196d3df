"""An edge that generates, in a process of its own: it is asked for texts, fast or exact, and says what they took."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Final

import torch

from isthmus.common.torch_threads import set_torch_threads
from isthmus.edge.client.link import connect
from isthmus.edge.generation.exact import exact_decoding
from isthmus.experiments.harness.processes import Parent, serve

MODULE: Final = "isthmus.experiments.generation.generate_process"


def _main(parent: Parent) -> None:
    task = parent.task
    set_torch_threads(1)
    with connect(task["connection"], key=task["key"], interactive=True) as link:
        model = link.load_model().eval()
        parent.say("ready")
        for question in parent.questions():
            ids = torch.tensor([question["ids"]])
            with exact_decoding(link, model) if question["exact"] else nullcontext():
                begun, cpu = time.perf_counter(), time.process_time()
                tokens = model.generate(
                    ids,
                    max_new_tokens=question["tokens"],
                    min_new_tokens=question["tokens"],
                    do_sample=False,
                    pad_token_id=0,
                )
            parent.say(
                {
                    "seconds": time.perf_counter() - begun,
                    "cpu_s": time.process_time() - cpu,
                    "tokens": tokens[0, ids.shape[1] :].tolist(),
                }
            )


if __name__ == "__main__":
    serve(_main)
