"""Whose arrays compute, and how fast: what gpt2.py's model and loop stand on."""
