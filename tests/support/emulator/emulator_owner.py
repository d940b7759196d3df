"""The owner of a model, who builds and signs packages by `isthmus emulator`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support.emulator.packages import tuned
from support.models.tiny import tiny_checkpoint
from typer.testing import CliRunner

from isthmus.cli.emulator_commands import app
from isthmus.emulator.package.package import open_package
from isthmus.protocol.secure.keys import generate_root, issue_worker, load_worker


class Owner:
    """A model, keys, public text, and the way to run commands there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = tiny_checkpoint("llama", folder / "model")
        self.home = folder / "home"
        generate_root(self.home)
        issue_worker(self.home)
        self.pin = str(load_worker(self.home).pin)
        self.text = folder / "public.txt"
        self.text.write_text("".join(f"The {i}th of the lines counts {i * i} things.\n" for i in range(60)))

    def run(self, *arguments: object) -> str:
        done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=True)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == 0, done.output
        return done.stdout

    def build_arguments(self, out: Path, *more: object) -> list[object]:
        where = ["--home", self.home, "--adapter-layers", "1:1", "--device", "cpu"]
        return ["build", "--model", self.model, "--out", out, "--licence", "tuning only", *where, *more]

    def build(self, out: Path, *more: object) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self.run(*self.build_arguments(out, *more, "--json")))
        return said

    def distil_arguments(self, steps: int = 3) -> list[object]:
        return ["--distill", self.text, "--distill-steps", steps, "--batch", 2, "--length", 32]

    def tune(self, package: Path, out: Path, method: str = "lora") -> Path:
        return tuned(open_package(package), out, method)
