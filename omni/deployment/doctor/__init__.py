"""What `omni_cli doctor` looks at. Nothing here changes the machine or what runs on it."""
