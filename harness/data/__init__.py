"""Images from source to network: where they come from and how they are stored, ordered, changed, loaded."""
