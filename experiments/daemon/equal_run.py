"""The adapters of a daemon beside those of `isthmus edge train`, bit for bit, on SmolLM2-135M and real data:

    python -m isthmus.experiments.daemon.equal_run --data ../shared/data

    kill    a job whose daemon is killed (`kill -9`) in the middle and started again
    tinker  three steps of Tinker's SDK, unmodified, on the batches that `isthmus edge train` draws

The adapters' files are compared by their SHA-256. The control of each is the same training from another seed, whose
adapter must differ. The exit code is 1 where an adapter is not as it must be.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from isthmus.backbone.adapters.custom_adapters import ADAPTER_WEIGHTS
from isthmus.backbone.checkpoints.sources import load_tokenizer, resolve
from isthmus.common.errors import IsthmusError
from isthmus.common.files import sha256_of
from isthmus.daemon.tinker.training.lora_shape import ALPHA
from isthmus.edge.config.training_config import load_config
from isthmus.edge.data.batches import IGNORED, Batches, Encoded, load_data
from isthmus.experiments.daemon.local_daemon import LocalDaemon
from isthmus.experiments.harness.launch import LocalCloud
from isthmus.experiments.harness.processes import run_isthmus, train_flags

MODEL = "smollm2-135m"
JOB_STEPS, KILLED_AFTER = 10, 4
TINKER_STEPS = 3
RATE, RANK, CLIP = 1e-3, 8, 1.0
SETTINGS: dict[str, Any] = {
    "prompt_template": "Meaning: {mr}\nText:",
    "completion_template": " {ref}",
    "validation_split": 0.0,
    "learning_rate": RATE,
    "rank": RANK,
    "max_grad_norm": CLIP,
}
LIKE_TINKER = {
    "steps": TINKER_STEPS,
    "alpha": ALPHA,
    "schedule": "constant",
    "target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
}
POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Comparison:
    """SHA-256 of three adapters: of `isthmus edge train`, of the daemon, and of another seed."""

    case: str
    edge_train: str
    daemon: str
    control: str

    @property
    def holds(self) -> bool:
        """Whether the daemon's is that of `isthmus edge train`, and the control's is not."""
        return self.daemon == self.edge_train != self.control


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder that has e2e/")
    parser.add_argument("--json", action="store_true", help="print JSON")
    asked = parser.parse_args()
    settings = {**SETTINGS, "data": str((asked.data / "e2e" / "train.csv").absolute())}
    with tempfile.TemporaryDirectory(prefix="isthmus-equal-") as name:
        folder = Path(name)
        with (
            LocalCloud(folder, MODEL, "--edge-layers", "2:2") as cloud,
            LocalDaemon(folder, cloud, {"save_every": 2}) as daemon,
        ):
            found = [_kill(daemon, Trainer(cloud, folder, settings)), _tinker(daemon, Trainer(cloud, folder, settings))]
    if asked.json:
        print(json.dumps([{**asdict(each), "holds": each.holds} for each in found]))
    else:
        for each in found:
            print(f"{each.case}: {'equal, and the control differs' if each.holds else 'NOT AS IT MUST BE'}")
            for side in ("edge_train", "daemon", "control"):
                print(f"  {side:11}{getattr(each, side)}")
    sys.exit(0 if all(each.holds for each in found) else 1)


class Trainer:
    """`isthmus edge train` with a cloud."""

    def __init__(self, cloud: LocalCloud, folder: Path, settings: dict[str, Any]) -> None:
        self.settings = settings
        self._cloud, self._folder = cloud, folder

    def run(self, name: str, **more: Any) -> str:
        """Train; the SHA-256 of the adapter."""
        out = self._folder / name
        options = {**self.settings, **more, "cloud": self._cloud.connection_file, "key": self._cloud.edge_key}
        run_isthmus("edge", "train", *train_flags({**options, "out": out}))
        return _adapter(out / "adapter")


def _kill(daemon: LocalDaemon, trainer: Trainer) -> Comparison:
    expected = trainer.run("undisturbed", steps=JOB_STEPS)
    spec = {**trainer.settings, "steps": JOB_STEPS}
    job = daemon.client.post("/isthmus/v1/jobs", {"kind": "train", "model": MODEL, "spec": spec})["id"]
    step = _wait(daemon, job, KILLED_AFTER)["step"]
    if step >= JOB_STEPS:
        raise IsthmusError(f"the job has made all {step} steps: there is nothing to disturb")
    daemon.kill()
    daemon.start()
    done = _wait(daemon, job, JOB_STEPS + 1)
    if done["status"] != "succeeded":
        raise IsthmusError(f"the job ended as {done['status']}: {done['error']}")
    control = trainer.run("other-seed", steps=JOB_STEPS, seed=1)
    return Comparison("kill", expected, _adapter(Path(done["adapter"])), control)


def _wait(daemon: LocalDaemon, job_id: str, step: int) -> dict[str, Any]:
    """A job that has made so many steps, or has ended."""
    while True:
        job: dict[str, Any] = daemon.client.get(f"/isthmus/v1/jobs/{job_id}")
        if job["step"] >= step or job["status"] not in ("queued", "running"):
            return job
        time.sleep(POLL_SECONDS)


def _tinker(daemon: LocalDaemon, trainer: Trainer) -> Comparison:
    import tinker

    options = {**trainer.settings, **LIKE_TINKER}
    expected = trainer.run("like-tinker", **LIKE_TINKER)
    config = load_config(None, {**options, "cloud": "-", "out": "-"})
    data = load_data(config, load_tokenizer(resolve(MODEL).folder))
    order = Batches(data.train, config.batch, data.pad_id, config.seed).order(0)
    steps = [[data.train[row] for row in order[at * config.batch :][: config.batch]] for at in range(TINKER_STEPS)]
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"
    client = tinker.ServiceClient(base_url="http://{}:{}".format(*daemon.address), api_key=daemon.token)
    ours, control = (_by_tinker(daemon, client, steps, seed) for seed in (config.seed, config.seed + 1))
    client.close("success").result()
    return Comparison("tinker", expected, ours, control)


def _by_tinker(daemon: LocalDaemon, client: Any, steps: list[list[Encoded]], seed: int) -> str:
    """Train with the SDK; the SHA-256 of the adapter."""
    from tinker import types

    adam = types.AdamParams(learning_rate=RATE, beta2=0.999, eps=1e-8, grad_clip_norm=CLIP)
    model = client.create_lora_training_client(base_model=MODEL, rank=RANK, seed=seed, train_unembed=False).result()
    for examples in steps:
        n = sum(label != IGNORED for example in examples for label in example.labels)
        model.forward_backward([_datum(example, n) for example in examples], "cross_entropy").result()
        model.optim_step(adam).result()
    saved = daemon.home / "tinker" / "weights"
    before = set(saved.iterdir())
    model.save_state("end").result()
    (new,) = set(saved.iterdir()) - before
    return _adapter(new)


def _datum(example: Encoded, n: int) -> Any:
    """An example of a batch with `n` labels; the loss of the batch is their mean, as in `isthmus edge train`."""
    from tinker import types

    weights = [0.0 if label == IGNORED else 1 / n for label in example.labels[1:]]
    inputs: dict[str, Any] = {"target_tokens": list(example.input_ids[1:]), "weights": weights}
    return types.Datum(model_input=types.ModelInput.from_ints(list(example.input_ids[:-1])), loss_fn_inputs=inputs)


def _adapter(folder: Path) -> str:
    return sha256_of(folder / ADAPTER_WEIGHTS).hex()


if __name__ == "__main__":
    main()
