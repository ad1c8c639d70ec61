"""The proxy's speed beside vllm-router, nginx and no proxy at all: `make bench-proxy`."""
