"""Which lossy rule is the fastest within a budget of quality?"""
