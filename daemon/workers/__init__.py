"""How the daemon's process and those that compute for it talk: frames over a pipe, questions with one or many answers.

It imports nothing of the daemon.
"""
