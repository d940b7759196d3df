"""What drafts tokens of answers, as the settings say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from isthmus.edge.config.client_config import GenerateConfig
from isthmus.edge.drafts.candidates import Draft
from isthmus.edge.drafts.ngram_draft import NgramDraft
from isthmus.edge.generation.text_generator import draft_of
from isthmus.protocol.secure.keys import Fingerprint


class OfferedDrafts:
    """The draft of one answer at a time; others at the same time go without.

    A package's draft shares the model that it was made for, so it is made anew for another one; n-grams fit all.

    Args:
        offered: See `isthmus.daemon.daemon_settings.DaemonSettings.offered_draft`.
    """

    def __init__(self, offered: str) -> None:
        self._offered = offered
        self._turn = threading.Lock()
        self._draft: Draft | None = NgramDraft() if offered == "ngram" else None
        self._model: Any = None

    @contextmanager
    def lend(self, model: Any, adapter: Path | None, signer: Fingerprint) -> Iterator[Draft | None]:
        """A draft for a model; None where there is none to be had.

        Raises:
            PackageError: The folder of the settings is no package, or one for another model.
        """
        if self._offered == "none" or not self._turn.acquire(blocking=False):
            yield None
            return
        try:
            if self._offered != "ngram" and self._model is not model:
                settings = GenerateConfig(cloud="-", draft=self._offered)
                self._draft, self._model = draft_of(settings, model, adapter, signer=signer), model
            yield self._draft
        finally:
            self._turn.release()
