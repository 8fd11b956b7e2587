"""The SDPO step: hindsight, loss, optimizer, engines. Knows nothing of HTTP or of how replies are served."""
