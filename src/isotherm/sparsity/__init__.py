"""Which neurons fire?"""
