"""Whole serving systems beside one another under a mix of chats and long prompts: `make bench-serving`."""
