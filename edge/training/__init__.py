"""The steps of edge training and its optimizers.

It may import `isthmus.edge.client`, what that may import, `isthmus.edge.run_files` and `isthmus.training`.
"""
