"""The service as its users run it: a process of its own, over HTTP."""
