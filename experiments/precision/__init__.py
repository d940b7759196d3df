"""What fewer bits cost: `isthmus bench codecs` for the wire, `isthmus bench quantize` for the backbone's weights."""
