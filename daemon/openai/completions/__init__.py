"""Chat and plain completions, whole and as streams.

chat_routes, chat_bodies                chat completions, and what they may ask
completion_routes, completion_bodies    plain completions, and what they may ask
sampling_bodies                         what both may ask
answer_events                           pieces of answers as one body or as server-sent events
token_texts                             the texts of single tokens

It may import what `isthmus.daemon.openai` may, and of that `model_names` and `request_fields`.
"""
