"""Benchmarks and experiments: every figure in the documents is printed by a command of this package."""
