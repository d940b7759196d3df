"""Keys and values of past tokens, so that a further token runs through the span alone.

`key_values` has a span's cache, `decode_pass` computes the next tokens of several sequences with theirs, and
`exact_layers` makes an edge's own layers exact. The edge's cache is in `isthmus.backbone.split.split_cache`.

It may import `isthmus.backbone.runtime`, `isthmus.backbone.split` and what these may import.
"""
