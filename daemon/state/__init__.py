"""What must survive a crash, in SQLite: who may ask, files, jobs, their events and checkpoints, models, promises.

It imports nothing of the daemon but `isthmus.daemon.adapter_places` and `isthmus.daemon.tokens`.
"""
