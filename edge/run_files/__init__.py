"""What a training run leaves in its folder beside its adapter: which run it is, what it has sent, its curves.

It may import `isthmus.edge.config`, `isthmus.privacy.defences` and `isthmus.training`.
"""
