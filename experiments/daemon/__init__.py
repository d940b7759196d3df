"""The edge daemon under load: what clients that ask much, slowly or wrongly cost the job that trains.

May import `isthmus.experiments.harness`. It talks to the daemon over HTTP alone.
"""
