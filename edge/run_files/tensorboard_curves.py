"""A run's curves in TensorBoard, for who wants them besides the loss log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from isthmus.common.errors import ConfigError
from isthmus.edge.config.training_config import TuningConfig

AddPoints = Callable[[int, Mapping[str, float]], None]
"""`(step, value by the curve's name)`: one more point of each curve."""


def no_curves(_step: int, _values: Mapping[str, float]) -> None:
    """Goes nowhere."""


@contextmanager
def open_curves(config: TuningConfig, step: int) -> Iterator[AddPoints]:
    """Where the points go that `config.report_to` asks for; a resumed run's curves go on after `step`.

    Raises:
        ConfigError: It asks for TensorBoard, which is not installed.
    """
    if config.report_to == "none":
        yield no_curves
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError(
            "report_to = 'tensorboard' needs the package tensorboard: "
            "pip install 'isthmus[tensorboard]', or --report-to none."
        ) from error
    with SummaryWriter(str(config.out / "tensorboard"), purge_step=step + 1) as writer:

        def add(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        yield add
