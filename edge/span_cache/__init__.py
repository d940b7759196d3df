"""The span's outputs on the edge's disk, where nothing trainable lies below the span.

It imports nothing else of `isthmus.edge`.
"""
