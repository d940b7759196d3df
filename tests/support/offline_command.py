"""A command of `isthmus` without any network: `python offline_command.py PORT WORDS…`, in a process that was forked.

The process enters a network namespace whose only interface, the loopback, is down. It tries to connect to PORT of
127.0.0.1, says on standard error what came of that, and is the command from then on.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import sys
from pathlib import Path

from isthmus.cli.main import console

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000  # sched.h
ITSELF = Path("/proc/self")


def leave_the_network() -> None:
    """Enter a namespace; whoever is not root needs a namespace of users for that. Raises OSError."""
    user, group = os.geteuid(), os.getegid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET | (CLONE_NEWUSER if user else 0)):
        raise OSError(ctypes.get_errno(), "the kernel refuses a network namespace")
    if user:
        (ITSELF / "setgroups").write_text("deny")
        (ITSELF / "uid_map").write_text(f"{user} {user} 1")
        (ITSELF / "gid_map").write_text(f"{group} {group} 1")


def main(port: str, *words: str) -> None:
    """See the top of the file."""
    leave_the_network()
    with socket.socket() as probe:
        result = probe.connect_ex(("127.0.0.1", int(port)))
    print("the probe says", errno.errorcode.get(result, "connected"), file=sys.stderr, flush=True)
    sys.argv = ["isthmus", *words]
    console()


if __name__ == "__main__":
    main(*sys.argv[1:])
