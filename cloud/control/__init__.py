"""The control plane: `serve`, the Ray actors of a cloud, and what looks after them.

It may import everything of `isthmus.cloud`, and is all of it that imports Ray.
"""
