"""What every part uses and that knows no model: errors with their exit codes, files, processes, cores, terminals.

It imports nothing else of Isthmus.
"""
