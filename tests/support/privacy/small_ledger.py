"""A ledger of leaks of three rows, as `isthmus experiment leak --json` prints it."""

from __future__ import annotations

from typing import Any


def run(row: str, attack: str, **values: Any) -> dict[str, Any]:
    """One entry; what is not given was not measured."""
    return {
        "row": row,
        "attack": attack,
        "cut": 2,
        "plan": "2:2",
        "mode": "split",
        "codec": "fp32",
        "defence": "none",
        "front": "known",
        "data": "e2e",
        "known_texts": 0,
        **values,
    }


def small_ledger(name: str = "cut 2", **more: Any) -> dict[str, Any]:
    """Rows without a defence, with noise, and with an emulator; the second has no intervals."""
    matching = {"token_accuracy": 0.998, "token_accuracy_interval": [0.99, 1.0], "rare_accuracy": 0.9}
    priors = {"prior_accuracy": 0.41, "prior_free_accuracy": 0.07, "prior_unigram_accuracy": 0.04}
    noise: dict[str, Any] = {"defence": "gaussian:clip=30,sigma=1", "defence_claim": "(epsilon, delta)"}
    noise |= {
        "token_accuracy": 0.95,
        "rare_accuracy": None,
        "task_loss_ratio": 1.34,
        "loss_ratio_without_defence": 1.21,
    }
    noise |= {"epsilon": 40.0, "delta": 1e-5}
    return {
        "model": "tiny",
        "data": "e2e",
        "sequences": 4,
        "processor": "a processor",
        "threads": 1,
        "seconds": 60.0,
        "settings": {"seed": 0},
        "runs": [
            run(name, "vocabulary_matching", task_loss_ratio=1.0, **matching, **priors),
            run(name, "labels-exact", label_accuracy=1.0, label_accuracy_interval=[0.25, 1.0], task_loss_ratio=1.0),
            run("noise", "vocabulary_matching", **noise),
            run("emulator", "none", mode="emulator", task_loss_ratio=1.3, **priors),
        ],
        **more,
    }
