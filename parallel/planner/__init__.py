"""Memory, bytes and time of a run over ranks before anything runs (plan, cost); simulate computes them event
by event."""
