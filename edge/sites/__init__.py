"""Which adapters inside the cloud's layers act at a step.

It may import `isthmus.edge.config`.
"""
