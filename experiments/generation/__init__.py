"""Benchmarks of generation with a cache on both sides. May import `harness`."""
