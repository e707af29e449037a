"""What is written: all or nothing, verified, in shards."""
