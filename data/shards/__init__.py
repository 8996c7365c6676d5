"""Shards: a filled cache and its records in a few large files, which training streams from an object store."""
