"""How a span computes: calls with sites, several calls in one pass, and what a call takes in memory.

It may import `isthmus.backbone.split` and what that may import, and the kernels.
"""
