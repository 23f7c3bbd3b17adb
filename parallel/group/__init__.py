"""The process group: who takes part (mesh, meeting), its collectives (comm; autograd for those with a
gradient), and what happens when a rank fails (watch, digest)."""
