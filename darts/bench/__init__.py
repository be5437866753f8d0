"""`python -m darts.bench`: strategies side by side, step by step in turns, on one warm engine and one trainer."""
