"""Flexpert: experts of one mixture-of-experts language model, trained apart, assembled, and taken out again."""

__version__ = "0.1.0"
