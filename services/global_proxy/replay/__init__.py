"""Going on with a stream whose D was lost: prompt and sent tokens are the prompt of another P and D."""
