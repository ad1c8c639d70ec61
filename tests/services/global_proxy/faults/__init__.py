"""What the proxy does when something breaks under load: real processes, real signals."""
