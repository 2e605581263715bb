"""Alembic revisions of serving's tables, with the version table `serving_version`."""
