"""Looks the lock's versions up among the known vulnerabilities (`make audit`), with pip-audit.

Exit code 0: all were looked up, and none is known to be vulnerable; 1: some are; 3: some could not be looked up.
pip-audit itself ends with 0 where the index answers and knows no vulnerabilities at all, as a mirror may.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lockfile

EXIT_VULNERABLE, EXIT_NOT_LOOKED_UP = 1, 3


def report(dependencies: list[dict[str, Any]]) -> tuple[list[str], int]:
    """The lines and the exit code for pip-audit's list of packages."""
    found = [
        f"{one['name']} {one['version']}: {known['id']}, mended in {', '.join(known['fix_versions']) or 'no version'}"
        for one in dependencies
        for known in one.get("vulns", [])
    ]
    skipped = [one["name"] for one in dependencies if "skip_reason" in one]
    lines = [*found]
    incomplete = bool(skipped) or not dependencies
    if incomplete:
        lines.append(
            f"error: {len(skipped)} of {len(dependencies)} packages could not be looked up in this index: "
            "try again where PyPI itself can be reached, or OSV (AUDIT_FLAGS='--vulnerability-service osv')"
        )
    lines.append(f"{len(dependencies) - len(skipped)} packages looked up, {len(found)} known vulnerabilities")
    if found:
        return lines, EXIT_VULNERABLE
    return lines, EXIT_NOT_LOOKED_UP if incomplete else 0


def main() -> int:
    """Look them up; arguments are more of pip-audit's options."""
    command = [
        *(str(Path(sys.executable).parent / "pip-audit"), "--requirement", str(lockfile.LOCK)),
        *("--disable-pip", "--require-hashes", "--format", "json", "--progress-spinner", "off", *sys.argv[1:]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        dependencies = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        print(f"error: the service of known vulnerabilities gives no answer: {reason}", file=sys.stderr)
        return EXIT_NOT_LOOKED_UP
    lines, code = report(dependencies)
    print("\n".join(lines))
    return code


if __name__ == "__main__":
    sys.exit(main())
