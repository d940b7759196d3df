"""What fewer bits cost: `isthmus bench codecs` for the wire, `isthmus bench quantize` for the backbone's weights.

May import `harness`, `scoring`, `benchmarks` and `placements`.
"""
