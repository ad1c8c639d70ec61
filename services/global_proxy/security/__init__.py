"""Who may ask, over what connection, and for what."""
