"""Benchmarks of one cloud with many tenants: throughput, fairness and deadlines. May import `harness`."""
