"""CLaaS: continual learning as a service.

Importing this package loads nothing heavy: torch, transformers and the backends' SDKs are imported by the files that need them.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
