"""A picture of a distillation's log."""

from __future__ import annotations

import json
from pathlib import Path

from isthmus.common.errors import DataError
from isthmus.common.figures import plotting, save_figure
from isthmus.emulator.distill.distillation import LOG_FILE

_TITLES = {
    "error": "relative error of the hidden states",
    "lm": "cross entropy, nats a token",
    "kl": "KL divergence, nats a token",
}


def loss_figure(folder: Path, path: Path) -> None:
    """Draw the log of a distillation: by step its relative error, and cross entropy and KL divergence if it has them.

    Raises:
        ConfigError: matplotlib is not installed.
        DataError: `folder` has no log.
        DiskError: The figure cannot be written.
    """
    plot = plotting()
    try:
        lines = [json.loads(line) for line in (folder / LOG_FILE).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} has no log of a distillation ({error}); name the folder of one.") from error
    drawn = [name for name in _TITLES if name == "error" or (lines and lines[0].get(name) is not None)]
    figure, axes = plot.subplots(len(drawn), figsize=(7, 3 * len(drawn)), dpi=144, sharex=True, squeeze=False)
    for row, name in zip(axes[:, 0], drawn, strict=True):
        row.plot([line["step"] for line in lines], [line[name] for line in lines], color="#1f4e79", linewidth=1.2)
        row.set(ylabel=_TITLES[name], xlabel="step")
        row.grid(alpha=0.3)
    save_figure(figure, path)
