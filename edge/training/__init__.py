"""The training loop, its step rules and optimizers, and what a run leaves on disk.

It may import `isthmus.edge.client` and what that may import.
"""
