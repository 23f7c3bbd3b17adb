"""MQAR, multi-query associative recall (Zoology, 2312.04927): small models trained from scratch, one for each
kind of sequence mixer."""
