"""Attacks on the labels, by the gradients at the span's output: `gradient_labels` has them, the others what they need.

It may import what `isthmus.privacy.attacks` may.
"""
