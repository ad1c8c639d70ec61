"""Which instances there are, how loaded they are, and the worker processes that share this knowledge."""
