"""Pictures on disk: what is asked for, made, read back, and the features taken of it."""
