"""From the bytes of a model file to a Checkpoint; nothing is believed before it is checked."""
