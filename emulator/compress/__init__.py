"""From layers to an emulator: the recipe, which layers are kept, and how each is made smaller.

It imports nothing else of `isthmus.emulator`.
"""
