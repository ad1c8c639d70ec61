"""Choosing an instance: one small class per policy. Depends on nothing else of the proxy."""
