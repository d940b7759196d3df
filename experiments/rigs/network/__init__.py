"""Slow and broken networks: relays, and network namespaces."""
