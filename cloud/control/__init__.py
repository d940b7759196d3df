"""The control plane: `serve`, the Ray actors of a cloud, and what looks after them.

It may import everything of `isthmus.cloud`. Its module `ray_cluster` is the only one that imports Ray.
"""
