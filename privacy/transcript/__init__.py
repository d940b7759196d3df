"""What a cloud signs of a session: a hash chain over the digests of what it was sent and what it answered.

It may import `isthmus.protocol` and `isthmus.common`; not the other parts of the privacy lab.
"""
