"""A browser as a client: a page that computes the front of a trained model, and talks to its back.

``python -m experiments.web RUN`` serves it; docs/web.md shows what it does.
"""
