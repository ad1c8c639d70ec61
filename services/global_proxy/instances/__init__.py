"""The engines: which there are, which answer, and one request to one of them."""
