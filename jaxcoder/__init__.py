"""jaxcoder: the StarCoder system in JAX."""

import logging

__version__ = "0.1.0"

# A library logs nothing unless the program that uses it configures logging.
logging.getLogger(__name__).addHandler(logging.NullHandler())
