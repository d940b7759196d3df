"""`isthmus bench secrets`: whether a nonce is used twice over crashes, and what a cloud keeps of sessions, and where.

| module | what is there |
|---|---|
| `nonce_log` | which key and nonce AES-GCM seals with, in the place of the cipher |
| `broken_random` | builds whose random source is constant: the controls of that log |
| `machines` | state machines that crash and begin again |
| `nursery`, `restarts` | processes of edges and workers that are killed and started again |
| `memory_scan` | looks for bytes in memory, shared memory and files |
| `text_forms` | looks for bytes and numbers in text, in the forms that they have there |
| `text_controls` | something in each of these forms, which must be found |
| `canaries` | the bytes to look for: what this process's sessions send, get and seal with |
| `sessions` | sessions in which a cloud gets all that it ever holds |
| `remains` | what a cloud holds of them, and what is left |
| `looked_at`, `ray_object` | a real cloud with its Ray as such a cloud, and an object in Ray that must be found |
| `secrets_bench` | the command: all parts, and what `--wipe-freed` costs |

May import `isthmus.cloud`, `isthmus.edge` and what lies below them, and from `isthmus.experiments` the harness.
"""
