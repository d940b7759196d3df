"""What a cloud tells its operator: logs, metrics, and the history of what it did.

It imports nothing else of `isthmus.cloud`.
"""
