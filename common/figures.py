"""matplotlib, an optional package, as the figures here use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from isthmus.common.errors import ConfigError
from isthmus.common.files import disk_errors


def plotting() -> Any:
    """`matplotlib.pyplot`, drawing to files.

    Raises:
        ConfigError: The package is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "figures need the package matplotlib: pip install 'isthmus[figures]', or leave the option for them out"
        ) from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure and forget it.

    Raises:
        DiskError: The disk is full or cannot be written.
    """
    figure.tight_layout()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    plotting().close(figure)
