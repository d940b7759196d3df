"""The end of a command's process.

A command that has trained leaves thousands of modules and close to a million objects. Before Python ends it looks
through all of them for cycles and takes them apart, which takes longer than many a command, and the kernel frees the
memory anyway.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable


def run_to_end(main: Callable[[], None]) -> None:
    """Run all that a process is for, and have it end as soon as all that must happen has.

    It ends with the code of `SystemExit`, or 0. Threads that are no daemons come to their end first, whatever has been
    registered with `atexit` since is called, and what was printed is written. Any other exception goes on as if this
    were not here.
    """
    code = 0

    def leave() -> None:
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return  # Python says what is wrong with it, and ends with a code of its own
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to be called
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        atexit.unregister(leave)
        raise
