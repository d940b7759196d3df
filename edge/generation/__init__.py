"""Generation on the edge: exact decoding, and what `isthmus edge generate` does.

text_generator      a model, its tokenizer and the settings: token ids in, token ids out
text_writer         writes an answer while it is generated
conversation        turns of a chat that share a cache
batch_file          the texts of a file, and which of them have an answer already
generation_run      the command's three uses: one answer, a conversation, a file of texts
exact               the same bits whatever is computed at the same time

It may import `isthmus.edge.client`, `isthmus.edge.data` and what these may import.
"""
