"""Slow and broken networks: relays, network namespaces, and `isthmus bench link`. May import no other rig."""
