"""The signed folder that a data owner tunes on, and what comes back: built, verified, taken in, plugged in.

It may import `isthmus.emulator.compress` and `isthmus.emulator.distill`.
"""
