"""Every reply with its exact tokens, kept under the completion id it was answered with."""
