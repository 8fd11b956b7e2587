"""The schema's history, run by `Database.migrate`. Written by hand: one file for each change of `models.py`."""
