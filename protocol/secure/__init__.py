"""Who is who, and how what they say is sealed: keys, the handshake, frames and the record layer.

It imports nothing of `isthmus.protocol` but its limits.
"""
