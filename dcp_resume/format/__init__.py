"""The bytes of a checkpoint: data files, their blocks and digests, the chunk index. No I/O."""
