"""Memory, bytes and seconds of a run over ranks, before it runs (job, plan, cost). simulate computes the
seconds of a layer event by event."""
