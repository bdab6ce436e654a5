"""What measures the project next to its peers: `harness bench NAME` in a checkout, for NAME of `commands.PEERS`.

They take the extras ffcv and bench (pip install '.[ffcv,bench]'); a contestant that is not installed is left out.
HARNESS_DATA=DIR: a folder with the real CIFAR-10 (loaders take synthetic images without it).
"""
