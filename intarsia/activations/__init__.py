"""Running layers over text: the loop, hidden states, hooks, statistics."""
