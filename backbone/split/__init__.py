"""The two halves of a cut model: the span of layers that the cloud runs, and the edge's model around it.

It may import `isthmus.backbone.sites`, `isthmus.backbone.peft_checks` and what these may import.
"""
