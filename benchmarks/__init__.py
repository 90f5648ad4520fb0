"""Benchmarks: costs of this package compared with common alternatives. See `make bench` and docs/performance.md."""
