"""Weight types: their block layouts and NumPy truth, the packed form P32, and the file that keeps it."""
