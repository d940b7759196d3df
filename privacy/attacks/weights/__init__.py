"""Attacks on weights, or by them: adapters inside the span, the span itself, and what a returned adapter says of texts.

Each says itself what it takes and gives. It may import what `isthmus.privacy.attacks` may, and the schedule of learning
rates of `isthmus.training`.
"""
