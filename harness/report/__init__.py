"""Pages about runs: self-contained HTML with charts as inline SVG, to be opened without a network."""
