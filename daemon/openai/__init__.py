"""OpenAI's API: files, fine-tuning jobs, events, checkpoints, models, chat and plain completions.

It may import `isthmus.daemon.web`, and what that may import.
"""
