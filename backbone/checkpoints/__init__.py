"""From a model's name to tensors on this disk, and how weights are held: fp32, bf16, or fewer bits.

It imports `isthmus.common` and the modules that stand directly in `isthmus.backbone`.
"""
