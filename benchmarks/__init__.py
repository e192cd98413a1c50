"""Times and memory of this project beside others': ``python -m benchmarks``, docs/benchmarks.md."""
