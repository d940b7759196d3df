"""Histories of workers (`isthmus.cloud.telemetry.event_history`) and the invariants that every one of them must keep.

| module | what is there |
|---|---|
| `events` | reads the files of all processes into one list in the order of time |
| `invariants` | what must be true of such a list, and where it is not |

Pure but for the reading of files. May import `isthmus.cloud.telemetry.event_history` and
`isthmus.cloud.gateway.open_sessions`' constants.
"""
