"""Python imports this when it begins, where this folder is on its path; see the package."""

from __future__ import annotations

import os

from isthmus.experiments.rigs.fault_points.fault_points import ENVIRONMENT, install

if os.environ.get(ENVIRONMENT):
    install()
