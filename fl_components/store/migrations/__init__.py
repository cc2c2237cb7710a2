"""Alembic's migrations. They run by themselves when a store is opened (`database.open_database`)."""
