"""Mixers: modules with a recurrent state that take the place of a layer's attention."""
