"""The gRPC client: one stream to a worker, and the sealed session over it, for edges and for a pipeline's stages.

It is asynchronous; `run` of `isthmus.rpc.transport` drives it from threads. It may import `isthmus.protocol` and
`isthmus.common`, and is all of the edge that imports gRPC.
"""
