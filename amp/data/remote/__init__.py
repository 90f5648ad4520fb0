"""Shards on S3, Google Cloud Storage, web servers and the Hugging Face hub.

`location` turns a URL into a file system of fsspec, `fetch` reads objects with retries and verification, `cache` keeps
whole shards on the disk of the node, `reader` reads samples from the cache or by ranges, and `ahead` fills the cache in
the order of the epoch. Nothing here is imported for local shards.
"""
