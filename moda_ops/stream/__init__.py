"""The depth stream: one buffer or a list of slots."""
