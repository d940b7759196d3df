"""The names of a recording's files. It imports nothing, so that a process without torch can look for them."""

PATTERN = "recording*.bin"
"""The files of a recording in its folder: one for each process that has written."""
