"""Benchmarks, the comparison of methods and what only a GPU can show; run by the commands beside this file."""
