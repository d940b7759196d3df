"""Fuzzes the decoders, each in a process of its own: `make fuzz FUZZ_SECONDS=60`.

Each target runs for so long, from its seeds, the kept corpus (`tests/fuzz/corpus`) and what earlier runs have found.
Inputs that reach something new go to `<work>/<target>/corpus` as they are found, so nothing is lost if the run is
stopped; what a decoder fails at goes to `<work>/<target>/findings`.

The exit code is 0 if nothing was found, every corpus reaches as many lines of its decoder as the target's floor asks
for, and the planted bug (`fuzz/planted.py`) was found; 1 otherwise; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from fuzz.outcome import Outcome, judged, read_log, table
from fuzz.target import CORPUS, names

PLANTED = "planted"
MEMORY = Path("/dev/shm")  # noqa: S108  # a folder of this user's own is made in it
"""A file system in memory, for decoders that read files."""
RSS_LIMIT_MB = 2048
"""More memory than any target needs, and less than a length that is believed would take."""
INPUT_SECONDS = 30
"""An input that takes longer is a finding."""


class StoppedError(Exception):
    """Raised where a process would be started after Ctrl-C."""


class Fuzzer:
    """Runs targets in processes of their own.

    Args:
        work: the folder for corpora, findings and logs.
        limit: libFuzzer's option that ends a run.
    """

    def __init__(self, work: Path, limit: str) -> None:
        self._work = work
        self._limit = limit
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False

    def run(self, name: str) -> Outcome:
        """Fuzz one target, and see how far its corpus reaches."""
        folder = self._work / name
        corpus, findings, seeds = (folder / each for each in ("corpus", "findings", "seeds"))
        for each in (corpus, findings):
            each.mkdir(parents=True, exist_ok=True)
        before = set(findings.iterdir())
        shutil.rmtree(seeds, ignore_errors=True)
        self._child(folder / "log", "seeds", name, str(seeds))
        options = [self._limit, f"-artifact_prefix={findings}/", "-print_final_stats=1", *self._options(folder)]
        # A corpus that shows the planted bug at once would show nothing of the fuzzer.
        inputs = [seeds] if name == PLANTED else [corpus, seeds, CORPUS / name]
        self._child(folder / "log", "fuzz", name, *options, *(str(each) for each in inputs if each.is_dir()))
        found = sorted(str(path) for path in set(findings.iterdir()) - before)
        log = read_log((folder / "log").read_text(errors="replace"))
        reached = self._child(folder / "lines", "lines", name, str(corpus))
        lines = json.loads((folder / "lines").read_text().splitlines()[-1]) if reached == 0 else None
        if name == PLANTED:  # in the next run it has to be found anew
            shutil.rmtree(findings)
        return judged(name, log, lines, found, sum(1 for _ in corpus.iterdir()), planted=name == PLANTED)

    def keep(self, name: str) -> None:
        """Make the kept corpus of what is known: the fewest inputs that reach as much.

        Raises:
            SystemExit: An input of the corpus is a finding, or libFuzzer cannot merge it.
        """
        folder, kept = self._work / name, CORPUS / name
        merged = folder / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir(parents=True)
        sources = [each for each in (folder / "corpus", folder / "seeds", kept) if each.is_dir()]
        findings = folder / "findings"
        before = set(findings.iterdir())
        options = ["-merge=1", f"-artifact_prefix={findings}/"]
        merging = self._child(folder / "merge", "fuzz", name, *options, str(merged), *map(str, sources))
        if merging != 0 or set(findings.iterdir()) - before:
            raise SystemExit(f"the corpus of {name} was not renewed: see {folder / 'merge'} and {findings}")
        kept.mkdir(parents=True, exist_ok=True)
        for path in kept.iterdir():
            if not path.name.startswith("crash-"):  # what a decoder once failed at stays
                path.unlink()
        for path in merged.iterdir():
            shutil.copyfile(path, kept / path.name[:16])

    def stop(self) -> None:
        """End what is running, and start nothing more."""
        self._stopped = True
        for process in list(self._running):
            process.terminate()

    def _options(self, folder: Path) -> list[str]:
        words = folder / "seeds.words"
        options = [f"-rss_limit_mb={RSS_LIMIT_MB}", f"-timeout={INPUT_SECONDS}"]
        return [*options, f"-dict={words}"] if words.is_file() and words.stat().st_size else options

    def _child(self, log: Path, *arguments: str) -> int:
        if self._stopped:
            raise StoppedError
        paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-P", "-m", "fuzz.child", *arguments]
        changes = {"PYTHONPATH": os.pathsep.join(paths), "TRANSFORMERS_VERBOSITY": "error"}
        log.parent.mkdir(parents=True, exist_ok=True)
        # libFuzzer ends a process without any clearing up, so what its decoder's files lie in is made and removed here.
        memory = MEMORY if MEMORY.is_dir() else None
        with log.open("wb") as out, tempfile.TemporaryDirectory(prefix="isthmus-fuzz-", dir=memory) as scratch:
            changes["TMPDIR"] = scratch
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | changes)
            self._running.append(process)
            try:
                return process.wait()
            finally:
                self._running.remove(process)


def main(arguments: Sequence[str] | None = None) -> int:
    """See above."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"some of {', '.join(names())}; all without any")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (60)")
    parser.add_argument("--runs", type=int, help="executions of each target, instead of seconds")
    parser.add_argument("--jobs", type=int, default=2, help="targets at a time (2)")
    parser.add_argument("--work", type=Path, default=Path(".fuzz"), help="folder for corpora and findings (.fuzz)")
    parser.add_argument("--keep", action="store_true", help="renew the kept corpus in tests/fuzz/corpus afterwards")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    unknown = set(options.targets) - {PLANTED, *names()}
    if unknown:
        parser.error(f"there is no target {min(unknown)}: choose of {', '.join(names())}")
    chosen = options.targets or [PLANTED, *names()]
    limit = f"-max_total_time={options.seconds}" if options.runs is None else f"-runs={options.runs}"
    fuzzer = Fuzzer(options.work, limit)
    outcomes: list[Outcome] = []
    code = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            for outcome in pool.map(fuzzer.run, chosen):
                outcomes.append(outcome)
                print(f"{outcome.target}: {outcome.verdict}", file=sys.stderr, flush=True)
            if options.keep:
                list(pool.map(fuzzer.keep, [name for name in chosen if name != PLANTED]))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            fuzzer.stop()
            print(f"stopped; what was found so far is in {options.work}", file=sys.stderr)
            code = 130
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes], indent=1))
    else:
        print(table(outcomes))
    return code or int(any(outcome.fault for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
