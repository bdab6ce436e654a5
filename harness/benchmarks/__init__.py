"""Measurements beside peers, in one run: what `harness bench` prints."""
