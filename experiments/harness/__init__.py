"""What all measurements share: clouds and edges in processes of their own, turns, memory, and finished work on disk."""
