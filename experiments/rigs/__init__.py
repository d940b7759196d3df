"""What breaks things on purpose, for benchmarks and tests. The wheel leaves it out: it is in the source tree alone.

May import all of `isthmus.experiments`; nothing outside imports it, and a command names it.
"""
