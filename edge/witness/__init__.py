"""What an edge notes of a run's calls, for an audit: the transcript that the cloud signs, and a sample of calls.

Imports `isthmus.privacy.transcript` and the protocol; nothing of the edge but its configuration.
"""
