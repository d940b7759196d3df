"""Writes the migration that is missing: `PYTHONPATH=tests python -P -m support.new_migration NAME`.

It compares the tables with what the migrations make, and writes what brings the one to the other, to be read and mended
before it is committed. Before the first release with a migration, it may be removed and written anew.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from isthmus.daemon.state.migrate import MIGRATIONS, migrate
from isthmus.daemon.state.tables import Table

_TEXT = '''"""{title}."""

import sqlalchemy as sa
from alembic import op

revision = "{revision}"
down_revision = {before}
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Bring the schema from the one before to this one."""
{body}
'''


def write(name: str) -> Path:
    """Write the migration called `name`, such as "colours_of_owners"."""
    versions = MIGRATIONS / "versions"
    last = max((path.name[1:5] for path in versions.glob("v*.py")), default=None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.db"
        if last is not None:
            migrate(path)
        engine = create_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            context = MigrationContext.configure(connection)
            operations = produce_migrations(context, Table.metadata).upgrade_ops
        engine.dispose()
    assert operations is not None
    body = "\n".join(
        line for line in render_python_code(operations, render_as_batch=True).splitlines() if "# ###" not in line
    )
    revision = f"{int(last or 0) + 1:04}"
    file = versions / f"v{revision}_{name}.py"
    title = name.replace("_", " ").capitalize()
    before = None if last is None else f'"{last}"'
    file.write_text(_TEXT.format(title=title, revision=revision, before=before, body=f"    {body.strip()}"))
    subprocess.run([sys.executable, "-m", "ruff", "format", "--quiet", str(file)], check=True)
    return file


if __name__ == "__main__":
    print(write(sys.argv[1]))
