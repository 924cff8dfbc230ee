"""Documents -> token store -> fill-in-the-middle windows -> batches. Only the loader may import jax."""
