"""What a run under defences has sent, and what is guaranteed of it: counted on the disk, before it is sent.

A step that is made again may be a further release, and so is an evaluation at another end. So each process of a run
counts what it begins to send.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from isthmus.common.errors import CheckpointError, ConfigError
from isthmus.common.files import write_atomic
from isthmus.edge.run_files.run_identity import START_ANEW
from isthmus.privacy.defences.accountant import Exposure, Guarantee, Releases, guarantee
from isthmus.privacy.defences.defence_options import DefenceOptions

RELEASES_FILE = "defence-releases"
"""Inside the run's folder: what the folder's runs have begun to send, as JSON, each by the fingerprint of its noise."""


class ReleaseLog:
    """What a run's processes have begun to send, in a file, and what is guaranteed of the run with it.

    The file is written before something is sent, so that it counts however a process ends. Only the process that holds
    the run's folder may use it.

    Args:
        path: The file.
        run: The fingerprint of the run's noise.
        defences: Of the run.
        exposure_after: Gives the exposure of a run that is resumed after so many applied steps, and whose earlier
            processes have begun to send so much.
        say: Told what is guaranteed, before this process sends an example of the run.

    Attributes:
        guarantee: None where no defence claims an (ε, δ), and until `settle` or `add` is called.
    """

    def __init__(
        self,
        path: Path,
        run: str,
        defences: Sequence[DefenceOptions],
        exposure_after: Callable[[int, Releases], Exposure],
        say: Callable[[str], None],
    ) -> None:
        self.guarantee: Guarantee | None = None
        self._done = 0
        self._path = path
        self._run = run
        self._defences = defences
        self._exposure_after = exposure_after
        self._say = say
        self._settled = False
        self._before: Releases | None = None

    @property
    def exposure(self) -> Exposure:
        """How often the example that is sent most often is sent, by all processes of the run.

        Raises:
            ConfigError: The file cannot be read.
        """
        if self._before is None:  # before this process has sent anything
            self._before = self._runs().get(self._run, Releases())
        return self._exposure_after(self._done, self._before)

    def go_on(self, done: int) -> None:
        """Let this process go on after `done` applied steps.

        Raises:
            CheckpointError: The file says nothing of them.
            ConfigError: It cannot be read.
        """
        if done and self._run not in self._runs():
            raise CheckpointError(
                f"the run cannot be resumed: {self._path}, which counts what it has sent, is missing or of other runs. "
                f"Put it back, or {START_ANEW}."
            )
        self._done = done

    def settle(self) -> None:
        """Find out what is guaranteed, with what other processes have sent, and say it; once.

        Raises:
            ConfigError: The file cannot be read.
        """
        if self._settled:
            return
        self._settled = True
        self.guarantee = guarantee(self._defences, self.exposure)
        if self.guarantee is not None:
            self._say(guarantee_line(self.guarantee))

    def add(self, *, epochs: int = 0, evaluations: int = 0) -> None:
        """Count what this process is about to send.

        Raises:
            ConfigError: The file cannot be read.
            DiskError: It cannot be written.
        """
        self.settle()
        runs = self._runs()
        before = runs.get(self._run, Releases())
        runs[self._run] = Releases(before.epochs + epochs, before.evaluations + evaluations)
        text = json.dumps({run: asdict(each) for run, each in runs.items()})
        write_atomic(self._path, f"{text}\n".encode(), 0o600)

    def _runs(self) -> dict[str, Releases]:
        try:
            runs = {run: Releases(**each) for run, each in json.loads(self._path.read_text(encoding="utf-8")).items()}
            if any(type(number) is not int or number < 0 for each in runs.values() for number in asdict(each).values()):
                raise ValueError("a count is no whole number")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{self._path}, which counts what the run has sent, cannot be read ({error}): {START_ANEW}."
            ) from error
        return runs


def guarantee_line(promised: Guarantee) -> str:
    """A guarantee for a person."""
    if promised.epsilon is None:
        return f"differential privacy: {promised.of}"
    return f"differential privacy: epsilon {promised.epsilon:.3g} at delta {promised.delta:g}, of {promised.of}"
