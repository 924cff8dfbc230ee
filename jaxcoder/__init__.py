"""jaxcoder: the StarCoder system in JAX."""

__version__ = "0.1.0"
