"""What the work costs, beside what a user would do instead, in one run: `make bench`, docs/performance.md."""
