"""What an attack got: how much of a guess is right, beside what a guess without the traffic would get.

It imports nothing else of `isthmus.privacy`, and takes tokens, texts and scores as they are.
"""
