"""Benchmarks and experiments: every figure in the documents is printed by a command that runs a module of this package.

May import all parts but `isthmus.cli`. A command imports `harness` alone at first: it names the function that measures,
and imports that when it runs.
"""
