"""Sweeps: a recipe trained at several settings and with several seeds, and what came of it."""
