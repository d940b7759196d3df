"""Generation on the cloud's side: the keys and values of past tokens, and the steps that use them.

`cache_pool` keeps them within one budget over all sessions; `decode_calls` makes steps of an edge's calls, which may
share a pass with those of other sessions.

May import `isthmus.cloud.engine`, `isthmus.cloud.telemetry`, `isthmus.backbone` and `isthmus.protocol`; no gRPC, no Ray.
"""
