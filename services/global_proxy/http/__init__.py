"""HTTP/1.1 at the protocol level, for the hot way of a request: clients on one side, engines on the other."""
