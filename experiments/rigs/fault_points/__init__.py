"""Faults at named points of a worker. The worker knows nothing of them: they are wrapped around its functions.

A cloud that is started with `fault_points.environment(folder)` has this folder on its `PYTHONPATH`. Every Python
process of it imports `sitecustomize` when it begins, which wraps the functions at the points as soon as they are
imported.

May import `isthmus.common`. It names functions of `isthmus.cloud` and `isthmus.protocol`, and imports them nowhere.
"""
