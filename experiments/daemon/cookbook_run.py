"""`chat_sl.train` of the package tinker_cookbook, unmodified, against a daemon and a cloud of this machine:

    python -m isthmus.experiments.daemon.cookbook_run --data ../shared/data --steps 20

The package goes into an environment of its own, by `--no-deps`, over this one's packages: it asks for others that the
index may lack. It prints each step's loss, and ends with 1 where the losses of the second half of the steps are, on
average, not below those of the first.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from isthmus.daemon.tokens import HUB, hash_of
from isthmus.experiments.daemon.local_daemon import LocalDaemon
from isthmus.experiments.harness.launch import LocalCloud

PACKAGES = ("tinker_cookbook==0.6.1", "chz", "blobfile", "termcolor", "tiktoken", "pyrage", "cloudpickle")
MODEL = "smollm2-135m"
ROWS = 400


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder that has e2e/")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="isthmus-cookbook-") as name:
        folder = Path(name)
        python = _environment(folder / "environment")
        data = folder / "e2e.jsonl"
        _write_data(asked.data / "e2e" / "train.csv", data)
        with LocalCloud(folder, MODEL, "--edge-layers", "2:2") as cloud, LocalDaemon(folder, cloud) as daemon:
            _train(python, daemon, folder, data, asked.steps, asked.batch_size)
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["train_mean_nll"] for line in lines]
    falls = loss_falls(losses)
    if asked.json:
        print(json.dumps({"model": MODEL, "batch_size": asked.batch_size, "losses": losses, "loss_falls": falls}))
    else:
        print("\n".join(f"step {step:4}  loss {loss:.4f}" for step, loss in enumerate(losses)))
    if not falls:
        sys.exit("the loss does not fall")


def loss_falls(losses: Sequence[float]) -> bool:
    """Whether the mean loss of the second half of the steps is below that of the first; of one step it does not."""
    half = len(losses) // 2
    return half > 0 and statistics.mean(losses[half:]) < statistics.mean(losses[:half])


def _environment(folder: Path) -> Path:
    """Its Python, which has the packages, and those of this one."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    base = str(folder)
    place = Path(sysconfig.get_path("purelib", vars={"base": base, "platbase": base}))
    (place / "this.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
    return python


def _write_data(source: Path, target: Path) -> None:
    """Conversations of real data: a meaning, and its text."""
    with source.open(encoding="utf-8-sig", newline="") as file, target.open("w") as out:
        for _, row in zip(range(ROWS), csv.DictReader(file), strict=False):
            roles = {"user": row["mr"], "assistant": row["ref"]}
            messages = [{"role": role, "content": text} for role, text in roles.items()]
            out.write(json.dumps({"messages": messages}) + "\n")


def _train(python: Path, daemon: LocalDaemon, folder: Path, data: Path, steps: int, batch_size: int) -> None:
    url = "http://{}:{}".format(*daemon.address)
    options = {
        "model_name": MODEL,
        "renderer_name": "role_colon",
        "dataset": data,
        "batch_size": batch_size,
        "max_length": 128,
        "lora_rank": 8,
        "learning_rate": 5e-4,
        "max_steps": steps,
        "save_every": 10,
        "eval_every": 0,
        "log_path": folder / "run",
    }
    environment = {
        **os.environ,
        "TINKER_BASE_URL": url,
        "TINKER_API_KEY": daemon.token,
        "HF_ENDPOINT": f"{url}/hub",
        "HF_TOKEN": f"{HUB}{hash_of(daemon.token)}",
        "HF_HOME": str(folder / "hub"),
        "NO_PROXY": "127.0.0.1,localhost",
    }
    words = [f"{name}={value}" for name, value in options.items()]
    command = [str(python), "-m", "tinker_cookbook.recipes.chat_sl.train", *words]
    subprocess.run(command, env=environment, stdout=sys.stderr, check=True)


if __name__ == "__main__":
    main()
