"""What explore.py stands on: gpt2.py as a syntax tree, the tracer, the server, and the page in page/."""
