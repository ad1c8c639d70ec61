"""Instances join, report their load, are drained and leave: a gRPC service (control_plane.proto) over the registry."""
