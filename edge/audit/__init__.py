"""Audits of a cloud: what a run keeps for one, and computing a sample of its calls again elsewhere."""
