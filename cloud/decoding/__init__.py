"""Generation on the cloud's side: the keys and values of past tokens, and the steps that use them.

`cache_pool` keeps them within one budget over all sessions; `decode_calls` makes steps of an edge's calls, which may
share a pass with those of other sessions.

It may import `isthmus.cloud.engine` and `isthmus.cloud.telemetry`, no gRPC and no Ray.
"""
