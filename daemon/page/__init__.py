"""The page at `/`, and the daemon's own API (`/isthmus/v1`), which the page and `isthmus edge jobs` use.

It may import `isthmus.daemon.web`, and what that may import.
"""
