"""The steps of edge training, its optimizers, and what a run leaves on disk.

It may import `isthmus.edge.client`, what that may import, and `isthmus.training`.
"""
