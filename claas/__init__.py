"""CLaaS: continual learning as a service.

Importing this package loads nothing heavy: torch, transformers and the backends' SDKs are imported by the files that need them.
"""

import os

# GNU OpenMP's threads spin for milliseconds at every barrier. Where another process wants the core, a token then takes ten times as long;
# waiting shortly and then sleeping costs next to nothing. Read once, when torch is first imported. See docs/decisions/0006-waiting.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__all__ = ["__version__"]
