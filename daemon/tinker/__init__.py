"""Tinker's API: forward, backward and optimizer steps one by one, sampling, and saved weights.

It may import `isthmus.daemon.web`, and what that may import; in the process that trains, `isthmus.edge`.
"""
