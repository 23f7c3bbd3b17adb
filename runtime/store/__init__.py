"""What a layer's cache keeps: KVStore and its kinds (of fixed size, over ranks), formats and memories."""
