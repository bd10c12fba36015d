"""Networks made harmonic, truncated and described: which convolutions can be swapped, and how."""
