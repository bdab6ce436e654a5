"""Recipes: what to train, as YAML with a frozen typed schema. `load` is the door."""

from harness.recipe.loading import load
from harness.recipe.schema import Recipe

__all__ = ["Recipe", "load"]
