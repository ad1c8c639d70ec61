"""What the proxy lets be seen: metrics, one log line per request, traces."""
