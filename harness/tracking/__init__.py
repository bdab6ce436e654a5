"""Where a run's figures go: metrics.jsonl, the console, Weights & Biases, all through one interface."""
