"""What this machine gives: which loader, which precision, how fast beside plain PyTorch. `harness bench` prints it."""
