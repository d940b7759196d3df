"""Generation on the edge: exact decoding, and what `isthmus edge generate` does.

It may import `isthmus.edge.client`, `isthmus.edge.data` and what these may import.
"""
