"""Sites as the edge sees them: where an adapter inside the cloud's layers is, and what it adds.

It may import `isthmus.backbone.checkpoints` and what that may import.
"""
