"""`isthmus cloud serve`: checks the options, starts the workers, looks after them, and stops them gracefully."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from isthmus.cloud.control.cluster import ControlStoreLostError, Serving
from isthmus.cloud.control.ports import Ports, parse_address
from isthmus.cloud.control.serve_options import ServeOptions
from isthmus.cloud.control.serve_state import clear_state, write_state
from isthmus.cloud.control.stop_signals import stop_on_signals
from isthmus.cloud.control.watches import watches
from isthmus.cloud.control.worker_specs import (
    Backbone,
    advertised_host,
    backbone_of,
    check_device,
    check_model,
    check_packages,
    check_recording,
    check_tls,
    count_workers,
    worker_specs,
)
from isthmus.cloud.home.home_lock import occupied
from isthmus.common.errors import UnreachableError
from isthmus.common.files import write_atomic
from isthmus.common.machine import threads_each, usable_cores
from isthmus.common.ownership import intruder
from isthmus.protocol.enrolment import EDGES_FILE, REVOKED_FILE, AuthorizedEdges, ConnectionString
from isthmus.protocol.secure.keyfiles import check_folder
from isthmus.protocol.secure.keys import ROOT_KEY, WorkerIdentity, load_worker

POLL_SECONDS = 2.0
"""Between two checks of the actors. Ray starts dead ones by itself; this decides when to give up."""
DEAD_POLLS = 15
"""Polls in a row, half a minute, for which a worker may be dead: several times what Ray needs to start one again."""


def serve(options: ServeOptions, ready: Callable[[str], None] = lambda connection: None) -> bool:
    """Serve until SIGTERM or SIGINT.

    Args:
        options: see `isthmus cloud serve --help`.
        ready: called with the connection string once the cloud serves.

    Returns:
        Whether every call in flight was answered before the end.

    Raises:
        HomeInUseError: another process serves with this home.
        KeyFileError: a key cannot be used, or another user may write the home.
        PackageError: a package of `emulators` is damaged, or of another model or plan.
        SignerError: one was signed under another root key.
        IsthmusError: the model, an address or a key cannot be used.
    """
    console = Console(stderr=True)
    say = functools.partial(console.print, highlight=False, markup=False, soft_wrap=True)
    options = dataclasses.replace(options, home=options.home.resolve())  # a link that changes later changes nothing
    home = options.home
    check_model(options.model)
    identity = _check_home(home, console)
    say(f"looking for the model {options.model}")
    backbone = backbone_of(options, console)
    say(f"the model {backbone.checkpoint.name} is there, split {backbone.plan}")
    check_device(options.device, wipe_freed=options.wipe_freed)
    _warn_of_intruders(backbone, console)
    count = count_workers(options, backbone.plan)
    if options.tls is not None:
        check_tls(options.tls)
    options = check_packages(options, identity.pin, backbone)
    if options.record is not None:
        check_recording(options.record)
        console.print(_recording_line(options.record, options.record_mib), highlight=False)
    with occupied(home) as lock, contextlib.closing(Ports()) as ports, contextlib.ExitStack() as stack:
        addresses = ports.take_several(options.listen, 1 if options.pipeline > 1 else count.most)
        operator = ports.take(options.metrics, "--metrics") if options.metrics else ""
        cores = usable_cores()
        threads = options.threads or threads_each(cores, count.most)
        specs = stack.enter_context(
            worker_specs(options, backbone, addresses, ports, beside=count.most, threads=threads)
        )
        console.print(_threads_line(threads, len(specs), cores), highlight=False)
        stop = threading.Event()
        with console.status("starting Ray and the workers"):
            serving = Serving(
                specs, home, lock.make_ray_folder(), least=count.least, metrics=operator, grace=options.grace, say=say
            )
        stop_on_signals(stop)
        try:
            port = parse_address(addresses[0])[1]
            connection = str(ConnectionString(advertised_host(options), port, identity.pin, options.tls is not None))
            write_state(home, {"connection": connection, "metrics": operator, "pid": os.getpid()})
            if options.connection_file is not None:
                write_atomic(options.connection_file, f"{connection}\n".encode())
            for line in serving.budgets():
                console.print(line, highlight=False)
            ready(connection)
            _supervise(stop, serving, console, watches(home, specs, operator, console))
            with console.status(f"draining: finishing the calls in flight (at most {options.grace:.0f} s)"):
                return serving.drain(options.grace)
        finally:
            clear_state(home)
            serving.close()


def _check_home(home: Path, console: Console) -> WorkerIdentity:
    """Check the cloud's folder; returns the worker's key and certificate. Raises KeyFileError, ConfigError."""
    identity = load_worker(home)
    check_folder(home)
    for name in (EDGES_FILE, REVOKED_FILE):
        if (home / name).exists():
            AuthorizedEdges.load(home / name)
    if (home / ROOT_KEY).exists():
        console.print(
            f"{home / ROOT_KEY} lies here, and no worker needs it: keep it on a machine that is not on the network",
            highlight=False,
        )
    return identity


def _warn_of_intruders(backbone: Backbone, console: Console) -> None:
    """Warn of folders that are served, and that another user may change."""
    for folder in (backbone.checkpoint.folder, backbone.parts):
        fault = intruder(folder) if folder.exists() else None
        if fault is not None:
            console.print(f"another user may change what is served from {folder}: {fault}", highlight=False)


def _recording_line(folder: Path, mib: int) -> str:
    """What is recorded, for the operator."""
    return (
        f"everything that edges send to be computed, and get for it, is recorded in {folder}, {mib} MiB at most. Their "
        "texts can be recovered from it, and they do not notice: tell the edges' owners"
    )


def _threads_line(threads: int, workers: int, cores: int) -> str:
    """How the workers' threads fit the cores, for the operator."""
    each = f"{threads} thread{'' if threads == 1 else 's'}"
    who = f"the worker computes with {each}" if workers == 1 else f"each of at most {workers} workers has {each}"
    line = f"{who}; this process may use {cores} core{'' if cores == 1 else 's'}"
    return line if threads * workers <= cores else f"{line}, so they will wait for each other"


def _supervise(stop: threading.Event, serving: Serving, console: Console, check: Callable[[], None]) -> None:
    """Look after the cloud until `stop` is set; start Ray and the workers again where its control store dies.

    Raises as `_wait` does.
    """

    def tend() -> None:
        check()
        serving.tend()

    while True:
        try:
            _wait(stop, serving.is_dead, tend)
            return
        except ControlStoreLostError:
            console.print("Ray's control store is gone; starting Ray and the workers again", highlight=False)
            serving.restart()
            stop_on_signals(stop)


def _wait(
    stop: threading.Event,
    is_dead: Callable[[], bool],
    tend: Callable[[], None] = lambda: None,
    poll: float = POLL_SECONDS,
) -> None:
    """Look after the workers until `stop` is set.

    Raises:
        UnreachableError: a worker is dead, `DEAD_POLLS` times in a row: Ray does not start it again.
    """
    dead = 0
    while not stop.wait(poll):
        dead = dead + 1 if is_dead() else 0
        if dead >= DEAD_POLLS:
            raise UnreachableError(
                "the worker is gone and Ray does not start it again: look into its log (worker.log, or worker-N.log), "
                "then run `isthmus cloud serve` anew"
            )
        tend()
