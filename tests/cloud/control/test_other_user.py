"""Another user of the cloud's machine: what they put in the way of its home, logs and sockets is refused or in vain.

The other user is a process with another uid; this process, as root, is the one that is attacked.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from support.cloud.clouds import Home
from support.models.tiny import tiny_checkpoint
from support.other_user import NOBODY, Attack

from isthmus.backbone.plan import SplitPlan
from isthmus.cli import cloud_commands
from isthmus.cloud.control import supervisor as serve_module
from isthmus.cloud.control.ports import Ports
from isthmus.cloud.control.ray_cluster import ray_environment
from isthmus.cloud.control.serve_options import ServeOptions
from isthmus.cloud.control.serve_state import STATE_FILE, write_state
from isthmus.cloud.control.worker import WorkerSpec
from isthmus.cloud.control.worker_setup import EdgesFile
from isthmus.cloud.control.worker_specs import stage_specs
from isthmus.cloud.home.home_lock import occupied
from isthmus.cloud.telemetry import logs
from isthmus.common.errors import KeyFileError
from isthmus.common.ownership import intruder
from isthmus.protocol.enrolment import AuthorizedEdges
from isthmus.protocol.secure.keyfiles import check_folder

# The home -------------------------------------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.parametrize(
    "attack",
    [
        "mkdir -m 0755 cloud",
        "mkdir theirs; ln -s theirs cloud",
        "mkdir -p own; ln -s {own} cloud",
        "mkdir -m 0777 cloud",
    ],
)
def test_no_key_is_made_in_a_home_that_another_user_has_made_first(
    place: Path, as_nobody: Attack, attack: str, tmp_path: Path
) -> None:
    own = tmp_path / "own"  # to which a link of theirs leads
    own.mkdir(mode=0o700)
    as_nobody(attack.format(own=own))
    with pytest.raises(KeyFileError, match=f"belongs to another user \\(uid {NOBODY},"):
        cloud_commands.keygen(place / "cloud")
    assert not [*own.iterdir(), *(place / "cloud").iterdir()]


@pytest.mark.root
@pytest.mark.usefixtures("without_ray")
def test_serve_refuses_a_home_that_another_user_may_write(place: Path, as_nobody: Attack) -> None:
    home = Home(place / "safe").folder
    model = str(tiny_checkpoint("llama", place / "model"))
    for folder, mode in ((home, 0o777), (home, 0o1777), (home.parent, 0o777)):
        before = folder.stat().st_mode
        folder.chmod(mode)
        with pytest.raises(KeyFileError, match="can be written by everybody"):
            serve_module.serve(ServeOptions(model, home, listen="127.0.0.1:0"))
        folder.chmod(before)
    os.chown(home, NOBODY, NOBODY)
    with pytest.raises(KeyFileError, match="belongs to another user"):
        serve_module.serve(ServeOptions(model, home, listen="127.0.0.1:0"))
    as_nobody(f"rm {home}/authorized_edges; touch {home}/authorized_edges")  # as they could have


@pytest.mark.root
def test_the_operator_is_told_of_a_model_that_another_user_may_change(
    place: Path, as_nobody: Attack, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve_module, "Serving", lambda *_, **__: sys.exit(7))
    home, model = Home(place / "safe").folder, tiny_checkpoint("llama", place / "model")
    told = []
    for owner in (os.geteuid(), NOBODY):
        os.chown(model, owner, -1)
        with pytest.raises(SystemExit):
            serve_module.serve(ServeOptions(str(model), home, listen="127.0.0.1:0"))
        told.append("another user may change what is served" in " ".join(capsys.readouterr().err.split()))
    assert told == [False, True]
    as_nobody(f"touch {model}/config.json.theirs")


def test_a_home_of_ones_own_is_taken_and_so_is_ones_own_link(tmp_path: Path) -> None:
    home = Home(tmp_path).folder
    (tmp_path / "link").symlink_to(home)
    for mode in (0o700, 0o750, 0o755):
        home.chmod(mode)
        check_folder(home)
        check_folder(tmp_path / "link")
    with pytest.raises(KeyFileError, match="cannot be entered"):
        check_folder(tmp_path / "nowhere")
    with pytest.raises(OSError, match="nowhere"):
        intruder(tmp_path / "nowhere")


@pytest.mark.root
def test_nobody_else_enrols_an_edge(place: Path, as_nobody: Attack) -> None:
    home = Home(place / "safe").folder
    edges, good = EdgesFile(home), AuthorizedEdges.load(home / "authorized_edges")
    file = home / "authorized_edges"
    home.chmod(0o755)
    line = file.read_text()
    file.chmod(0o666)
    as_nobody(f"echo '# theirs' >> {file}")
    with pytest.raises(KeyFileError, match=r"says whom to trust, and can be written by everybody \(mode 0666\)"):
        AuthorizedEdges.load(file)
    assert len(edges()) == len(good)  # a running worker keeps the last good list
    file.write_text(line)
    file.chmod(0o644)
    os.chown(file, NOBODY, NOBODY)
    with pytest.raises(KeyFileError, match="belongs to another user"):
        AuthorizedEdges.load(file)


@pytest.mark.root
def test_what_the_cloud_writes_in_its_home_is_for_its_user_alone(place: Path, as_nobody: Attack) -> None:
    home = Home(place / "safe").folder
    for folder in (home.parent, home):
        folder.chmod(0o755)  # the worst that is accepted
    (home / "worker.log").write_text("tenants\n")  # of an older release
    handlers = logs.LOGGER.handlers[:]
    for name in ("worker.log", "serve.log"):
        logs.log_to(home / name)
        logs.LOGGER.handlers[0].close()
    logs.LOGGER.handlers[:] = handlers
    write_state(home, {"connection": "", "metrics": "", "pid": 1})
    ray_environment(home)
    plan = SplitPlan.parse("2:2", 8)
    names = ["worker.log", "serve.log", STATE_FILE, "ray_token", "root_key", "worker_key"]
    with closing(Ports()) as ports, stage_specs(_spec(home), plan, 2, ports):
        for name in [*names, "pipeline/1/id_ed25519"]:
            assert (home / name).exists()
            assert as_nobody(f"cat {home / name}", check=False).returncode != 0
    as_nobody(f"cat {home / 'worker_cert'}")  # the control: they come as far as this


@pytest.mark.root
def test_a_log_and_a_lock_are_not_written_through_a_link(place: Path, as_nobody: Attack) -> None:
    home = place / "home"
    home.mkdir(mode=0o777)
    home.chmod(0o777)  # though `serve` would refuse it
    (place / "precious").write_text("mine")
    as_nobody("cd home; ln -s ../precious worker.log; ln -s ../precious serve.lock")
    with pytest.raises(OSError, match=r"worker\.log"):
        logs.log_to(home / "worker.log")
    with pytest.raises(OSError, match=r"serve\.lock"), occupied(home):
        pytest.fail("it was held")
    assert (place / "precious").read_text() == "mine"


def test_a_token_that_others_can_read_is_refused(tmp_path: Path) -> None:
    assert (ray_environment(tmp_path), (tmp_path / "ray_token").stat().st_mode & 0o777)[1] == 0o600
    (tmp_path / "ray_token").chmod(0o640)
    with pytest.raises(KeyFileError, match="ray_token can be read by others"):
        ray_environment(tmp_path)


# Ray's folder ---------------------------------------------------------------------------------------------------------

SERVER = """
import os, socket, sys, time
from pathlib import Path
from isthmus.cloud.home.home_lock import occupied
with occupied(Path(sys.argv[1])) as lock:
    folder = lock.make_ray_folder()
    folder.mkdir()
    folder.chmod(0o777)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "raylet"))
    os.chmod(folder / "raylet", 0o777)
    listener.listen()
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.mark.root
def test_nobody_else_reaches_or_renames_rays_sockets(place: Path, as_nobody: Attack) -> None:
    home = Home(place / "safe").folder
    environment = {**os.environ, "TMPDIR": str(place)}
    command = [sys.executable, "-c", SERVER, str(home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as ray:
        try:
            assert ray.stdout is not None
            folder = Path(ray.stdout.readline().strip())
            assert folder.parent.parent == place
            raylet = folder / "raylet"
            for attempt in (
                f"mv {raylet} {raylet}.theirs",
                f"ls {folder}",
                f"touch {folder}/theirs",
                f"mv {folder.parent} {place}/theirs",
            ):
                refused = as_nobody(attempt, check=False)
                assert refused.returncode != 0
                assert "ermi" in refused.stderr + refused.stdout, refused  # Permission denied, or not permitted
            with pytest.raises(PermissionError):
                connect(raylet)
            folder.parent.chmod(0o777)  # the control: where Ray's folder lay before, all of them succeed
            connect(raylet)
            as_nobody(f"mv {raylet} {raylet}.theirs")
        finally:
            ray.kill()


def connect(path: Path) -> None:
    """Connect as the other user."""
    os.seteuid(NOBODY)
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    finally:
        os.seteuid(0)


def _spec(home: Path) -> WorkerSpec:
    return WorkerSpec("", "tiny", "2:2", "fp32", "", str(home), "", 1, 1, 1, "")
