"""The first tables."""

from alembic import op

from isthmus.daemon.state.tables import Table

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make them."""
    Table.metadata.create_all(op.get_bind())
