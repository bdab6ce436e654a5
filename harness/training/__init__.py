"""Training: from built parts to a finished run directory."""
