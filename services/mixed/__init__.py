"""Mixed instances, which do prefill and decode: the code is that of `services.engine_host`, the role is mixed."""
