"""Keys and values of past tokens, so that a further token runs through the span alone.

`key_values` has a span's cache, and `decode_pass` computes the next tokens of several sequences with theirs. Of an
edge's own layers, `exact_layers` makes them exact, and `few_rows` makes verifying a draft fast. The edge's cache is in
`isthmus.backbone.split.split_cache`.

It may import `isthmus.backbone.runtime`, `isthmus.backbone.split` and what these may import.
"""
