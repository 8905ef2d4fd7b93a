"""The demo: one small GPT, trained dense, sparse from scratch, and pruned and retrained."""
