"""The gRPC client: one stream to a worker, and the sealed session over it.

It may import `isthmus.protocol` and `isthmus.common`, and is all of the edge that imports gRPC.
"""
