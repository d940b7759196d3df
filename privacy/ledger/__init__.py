"""What each attack got of one recording: attacks are run and judged beside the truth.

The experiments run it on a cloud's recordings, and an edge on a sample of what it is about to send. It may import what
`isthmus.privacy` may, and `recording`, `attacks` and `measures`.
"""
