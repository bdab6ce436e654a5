"""A training harness for CIFAR-scale image classification: one YAML recipe, any number of devices."""

__version__ = "0.1.0"
