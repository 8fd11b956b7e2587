"""Migrations, oldest first. They name plain column types, so that they stay what they were when `models.py` moves on."""
