"""The client of a cloud: calls that are repeated until they are answered, files, and the remote span as a function.

It may import `isthmus.rpc`, `isthmus.edge.codecs` and `isthmus.edge.config`.
"""
