"""From files to batches of tokens and labels.

It may import `isthmus.edge.config`.
"""
