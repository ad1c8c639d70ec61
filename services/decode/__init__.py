"""Decode instances: the code is that of `services.engine_host`, the role is decode."""
