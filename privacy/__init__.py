"""The privacy lab: what a cloud can learn of an edge's texts, and what changes that.

`recording` is what an honest-but-curious cloud has of a session, as a file and as tensors.

It may import `isthmus.backbone`, `isthmus.protocol` (messages and codecs), `isthmus.common`, torch and transformers;
never the edge, the cloud, gRPC or Ray.
"""
