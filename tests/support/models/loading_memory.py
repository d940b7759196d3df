"""What loading a part of a model takes: `python loading_memory.py span|edge SMALL LARGE`, in a process of its own.

It prints the most anonymous memory that loading the large checkpoint took, over the bytes of the weights that it kept,
and those bytes. Both checkpoints have eight layers.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import Any

from isthmus.backbone.plan import SplitPlan
from isthmus.backbone.split.edge_parts import load_edge_parts
from isthmus.backbone.split.span import load_span


def anonymous() -> int:
    """Bytes of anonymous memory that this process has."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load(part: str, folder: Path) -> Any:
    """The span, or the edge's parts."""
    plan = SplitPlan(8, 2, 2)
    return load_span(folder, plan) if part == "span" else load_edge_parts(folder, plan, lambda h, m, p: h)


def main(part: str, small: str, large: str) -> None:
    """See the top of the file."""
    load(part, Path(small))  # the imports and caches of a first load are not what is measured
    before = peak = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(part, Path(large))
    done.set()
    watcher.join()
    peak = max(peak, anonymous())
    kept = sum(p.numel() * p.element_size() for p in model.parameters())
    print((peak - before) / kept, kept)


if __name__ == "__main__":
    main(*sys.argv[1:])
