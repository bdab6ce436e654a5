"""Comparing runs: groups of one recipe with several seeds, what differs between them, and what that tells."""
