"""Keys and values of past tokens, so that a further token runs through the span alone.

`key_values` has a span's cache, and `decode_pass` computes the next tokens of several sequences with theirs. The edge's
cache is in `isthmus.backbone.split.split_cache`.

May import `isthmus.backbone` (`runtime` and `split`) and what stands below it; no gRPC, no Ray, no protocol.
"""
