"""Which codec each direction of the wire uses, chosen by hand or by what it does to gradients.

It may import `isthmus.edge.data` and `isthmus.edge.config`.
"""
