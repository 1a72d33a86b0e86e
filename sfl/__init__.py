"""SFL: split learning and SplitFed learning over real sockets."""

__version__ = "0.2.0"
