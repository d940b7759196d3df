"""Jobs: their queue, the processes that do them, and what they leave.

It may import `isthmus.daemon.workers`, `isthmus.daemon.state` and, in a job's own process, `isthmus.edge`.
"""
