"""`isthmus bench chaos`: several tenants train while whatever can break breaks.

May import the other rigs but `abuse`.
"""
