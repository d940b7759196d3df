"""Answers: the process that keeps links open and adapters hot, and what the daemon asks it.

It may import `isthmus.daemon.workers`, `isthmus.daemon.state` and, in its own process, `isthmus.edge`.
"""
