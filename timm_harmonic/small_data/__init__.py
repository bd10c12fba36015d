"""Plain against harmonic on few images: the quickstart, its photographs, its recipe and its picture."""
