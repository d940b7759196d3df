"""Benchmarks and experiments: every figure in the documents is printed by a command that runs a module of this package.

May import all parts but `isthmus.cli`. A command imports settings alone at first, of `harness` or of `leak`: they name
the function that measures, which is imported when the command runs.
"""
