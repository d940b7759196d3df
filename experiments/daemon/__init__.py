"""The edge daemon under load: what clients that ask much, slowly or wrongly cost the job that trains.

May import `isthmus.experiments.harness`, and of the daemon what asks it (`isthmus.daemon.daemon_client`) and where its
files are.
"""
