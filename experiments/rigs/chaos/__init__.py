"""`isthmus bench chaos`: several tenants train while whatever can break breaks."""
