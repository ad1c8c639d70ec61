"""The global proxy: one OpenAI-compatible endpoint in front of a prefill pool and a decode pool."""
