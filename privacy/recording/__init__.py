"""What an honest-but-curious cloud has of a session: messages as they came and went, as a file and as tensors.

It may import `isthmus.protocol` and `isthmus.common`, and nothing else of `isthmus.privacy`.
"""
