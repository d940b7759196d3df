"""Distillation: an emulator is trained on public text to do what the middle layers do.

It may import `isthmus.emulator.compress`.
"""
