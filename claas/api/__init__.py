"""The wire: OpenAI-compatible serving and CLaaS's own routes over `Services`."""
