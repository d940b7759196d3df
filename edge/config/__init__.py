"""The settings of a run: a TOML file, flags of the same names, and what follows from them.

It imports nothing else of `isthmus.edge` but the report's names.
"""
