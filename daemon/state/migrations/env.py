"""Alembic runs this file to migrate. The connection comes from `isthmus.daemon.state.migrate`."""

from alembic import context

from isthmus.daemon.state.tables import Table

if hasattr(context, "config"):  # where Alembic runs it, and not somebody who imports it
    context.configure(
        connection=context.config.attributes["connection"], target_metadata=Table.metadata, render_as_batch=True
    )
    with context.begin_transaction():
        context.run_migrations()
