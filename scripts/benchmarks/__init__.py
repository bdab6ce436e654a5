"""The project beside its peers, in one run: `python -m scripts.benchmarks NAME`, or `harness bench NAME`."""
