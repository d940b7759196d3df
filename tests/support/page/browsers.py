"""Debian's Chromium, and a page of it that notices whatever a page of the daemon must not do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, Page, expect, sync_playwright

PATIENCE = 60_000
"""Milliseconds that whatever is waited for may take on a busy machine."""
expect.set_options(timeout=PATIENCE)

_TELL_VIOLATIONS = "addEventListener('securitypolicyviolation', (e) => told(`${e.effectiveDirective} ${e.blockedURI}`))"


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser without a window."""
    # Chromium's own sandbox does not start for root.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=arguments)
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page, and what it has done.

    Attributes:
        elsewhere: Requests to another origin than `url`'s.
        problems: Errors and warnings of the console, and exceptions.
        violations: Of the content security policy.
    """

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        self.url = url
        self.elsewhere: list[str] = []
        self.problems: list[str] = []
        self.violations: list[str] = []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda message: self._hear(message.type, message.text))
        self.page.expose_function("told", lambda what: self.violations.append(what))
        self.page.add_init_script(_TELL_VIOLATIONS)

    def _note(self, address: str) -> None:
        if urlsplit(address).scheme != "data" and not address.startswith(f"{self.url}/"):
            self.elsewhere.append(address)

    def _hear(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.problems.append(text)

    @property
    def faults(self) -> list[str]:
        """All that it must not have done."""
        return [*self.elsewhere, *self.problems, *self.violations]

    def open(self, token: str, place: str = "jobs") -> Page:
        """Sign in, at a place of the page."""
        self.page.goto(f"{self.url}/#{place}")
        self.page.fill("#token", token)
        self.page.press("#token", "Enter")
        self.page.wait_for_selector("#top:not([hidden])")
        return self.page

    def close(self) -> None:
        """Close it."""
        self.context.close()
