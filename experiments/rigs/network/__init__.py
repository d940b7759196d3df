"""Narrow and broken connections: `isthmus bench link`, and a relay that breaks connections. May import no other rig."""
