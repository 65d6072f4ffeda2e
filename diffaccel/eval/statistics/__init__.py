"""Numbers from features: NumPy only, no network, no file of pictures."""
