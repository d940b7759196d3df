"""The page of a real daemon, which tunes and answers over a real cloud."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import expect
from support.cloud.clouds import Home as CloudHome, ThreadServer, served
from support.daemon import warm_daemon
from support.models.writing_model import writing_checkpoint
from support.page.browsers import Watched, chromium
from support.warm_processes import WarmPopen

from isthmus.common.torch_threads import torch_threads

pytestmark = [pytest.mark.browser, pytest.mark.server]

STEPS = 60
SLOW = 60_000
"""Milliseconds that a process which imports torch may take on a busy machine."""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ThreadServer]:
    home = CloudHome(tmp_path)
    model = writing_checkpoint("llama", tmp_path / "model")
    with torch_threads(1), ThreadServer(served(model, tmp_path / "parts"), home) as running:
        yield running


@pytest.fixture
def daemon(server: ThreadServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, str]]:
    """A daemon's URL and token."""
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    home = tmp_path / "daemon"
    home.mkdir(mode=0o700)
    lines = (
        'listen = "127.0.0.1:0"',
        "save_every = 5",
        "checkpoints_per_job = 1000",  # none that is talked to is replaced meanwhile
        "[clouds.main]",
        f'cloud = "{server.address}"',
        "connect_timeout = 60",
    )
    text = "\n".join((*lines, f'key = "{server.home.key_file}"\n'))
    (home / "daemon.toml").write_text(text, encoding="utf-8")
    command = [sys.executable, warm_daemon.__file__, "start", "--home", str(home)]
    with WarmPopen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        yield url, (home / "token").read_text(encoding="utf-8").strip()
        process.terminate()
        process.stdout.read()


def test_a_job_is_tuned_watched_talked_to_and_cancelled(daemon: tuple[str, str], tmp_path: Path) -> None:
    url, token = daemon
    file = tmp_path / "tickets.csv"
    file.write_text("ticket,queue\n" + '"charged twice, again",billing\n' * 24, encoding="utf-8")
    with chromium() as browser:
        watched = Watched(browser, url)
        page = watched.open(token, "crossed")
        expect(page.locator(".drawing svg")).to_contain_text("2 middle layers", timeout=SLOW)
        page.goto(f"{url}/#new")
        page.get_by_label("File", exact=True).set_input_files(file)
        expect(page.locator(".hint", has_text="24 rows; columns: ticket, queue")).to_be_visible()
        page.get_by_label("Completion").fill(" {queue}")
        page.get_by_label("Name").fill("tickets")
        page.get_by_label("Length", exact=True).fill(str(STEPS))
        page.get_by_label("Unit of the length").select_option("steps")
        page.get_by_label("Learning rate").evaluate("(field) => { field.closest('details').open = true }")
        page.get_by_label("Learning rate").fill("0")
        page.click("text=Start the job")
        # What the real configuration refuses stands beside its field.
        expect(page.locator(".error", has_text="learning_rate = 0")).to_be_visible()
        assert watched.problems.pop().startswith("Failed to load resource")
        page.get_by_label("Learning rate").fill("0.001")
        page.get_by_label("Prompt").fill("Ticket: {ticket}")
        page.click("text=Start the job")
        expect(page.locator("h1")).to_have_text("tickets", timeout=SLOW)
        expect(page.locator(".line-train")).to_have_attribute("d", re.compile("L"), timeout=SLOW)
        page.reload()
        talk = page.get_by_role("link", name=re.compile("Talk to the checkpoint")).first
        expect(talk).to_be_visible(timeout=SLOW)
        expect(page.locator(".stat", has_text="Sent to the cloud")).to_contain_text("B")
        talk.click()
        expect(page.get_by_label("Ask as")).to_have_value("text", timeout=SLOW)  # as it is tuned
        page.get_by_label("Most tokens").fill("8")
        page.get_by_label("Your message").fill("Ticket: charged twice")
        page.keyboard.press("Enter")
        for side in range(2):
            expect(page.locator(".said").nth(side)).to_have_text(re.compile(r"\w"), timeout=SLOW)
        expect(page.locator("[aria-busy]")).to_have_count(0)
        page.goto(f"{url}/#jobs")
        page.locator(".job").click()
        expect(page.locator(".pill")).to_have_text(re.compile("running|succeeded"))
        if page.get_by_role("button", name="Cancel").is_visible():
            page.get_by_role("button", name="Cancel").click()
            page.get_by_role("button", name="Cancel the job").click()
        expect(page.locator(".pill")).to_have_text(re.compile("cancelled|succeeded"), timeout=SLOW)
        page.goto(f"{url}/#crossed")
        expect(page.locator(".drawing .wire-figure").first).not_to_have_text("0 B", timeout=SLOW)
        page.screenshot(path=tmp_path / "crossed.png", full_page=True)
        assert watched.faults == []
