"""The data plane: the gRPC server, which streams become sessions, and what a session may have in flight.

It may import `isthmus.cloud.session` and what that may import, and `isthmus.rpc`, by which a pipeline reaches its next
stage. No Ray.
"""
