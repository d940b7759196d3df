"""What a cloud tells its operator: logs, metrics, and the history of its sessions and calls.

It imports nothing else of `isthmus.cloud`.
"""
