"""Every way of training side by side: `isthmus bench placements`."""
