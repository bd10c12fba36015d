"""Plain against harmonic networks on few images: tasks, training, the protocol of a comparison, and its results."""
