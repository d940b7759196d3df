"""Histories of workers (`isthmus.cloud.history`) and the invariants that every one of them must keep.

| module | what is there |
|---|---|
| `events` | reads the files of all processes into one list in the order of time |
| `invariants` | what must be true of such a list, and where it is not |

Pure but for the reading of files. May import `isthmus.cloud.history` and `isthmus.cloud.sessions`' constants.
"""
