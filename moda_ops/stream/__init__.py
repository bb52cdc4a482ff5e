"""The depth stream: one buffer or a list of slots, and what layers ask of any stream."""
