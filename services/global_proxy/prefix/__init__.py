"""How much of a prompt each prefill engine has cached: exactly from vLLM's KV events, or by what was sent there."""
