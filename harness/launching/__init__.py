"""Starting training: how many processes, how many threads each, and what becomes of their exit codes."""
