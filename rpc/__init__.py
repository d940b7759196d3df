"""The gRPC client: one stream to a worker, and the sealed session over it, for edges and for a pipeline's stages.

It is asynchronous; `isthmus.rpc.event_loop` drives it from threads. It may import `isthmus.protocol` and
`isthmus.common`, and is all of the edge that imports gRPC.
"""
