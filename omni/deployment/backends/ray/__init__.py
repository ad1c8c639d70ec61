"""Runs a deployment on a Ray cluster: an actor for each group of engines on each of its nodes, and one for the proxy.

Beside the library of that name, which only `backend.py`'s own modules import: absolute imports alone.
"""
