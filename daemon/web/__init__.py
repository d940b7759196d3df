"""What all the APIs share: who asks, what an error looks like, what is refused before it is read.

It may import `isthmus.daemon.jobs`, `isthmus.daemon.serving`, and what they may import.
"""
