"""Training engines: one contract (`base`), one file for each backend."""
