"""Types, errors, settings and names. Imports nothing else of CLaaS."""
