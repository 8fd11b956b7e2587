"""Adapter versions on disk: immutable, published whole or not at all, with one `latest` pointer for each adapter."""
