"""What computes: whose turn it is, the threads, passes over the span, and calls that pause.

It imports no gRPC and no Ray, and of `isthmus.cloud` only `isthmus.cloud.bounds`.
"""
