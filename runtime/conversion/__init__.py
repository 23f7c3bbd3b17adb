"""Conversion of a pretrained model: mixers take the place of some of its attention layers."""
