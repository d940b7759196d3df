"""The migrations of the database, for Alembic: `env.py` runs them, `versions/` has one file for each."""
