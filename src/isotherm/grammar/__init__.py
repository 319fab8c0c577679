"""Which tokens may come next, where an answer must follow a grammar."""
