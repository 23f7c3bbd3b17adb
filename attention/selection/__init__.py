"""Which keys each query reads, and all that can be done with it; one file per kind of selection."""
