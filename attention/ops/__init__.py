"""Operations on tensors. An operation's name says what it computes; ``impl`` says how.

Each folder holds ``api.py`` (checks and dispatch), ``reference.py`` (the definition, naive, in float32 or
float64) and ``eager.py`` (fast torch on any device). ``impl="auto"`` takes the fastest implementation there
is for the device.
"""
