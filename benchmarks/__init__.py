"""Each measures one thing: `python -m benchmarks.NAME`."""

import claas  # noqa: F401 - it sets how threads wait, before torch is there
