"""How every verb that computes begins."""

from collections.abc import Callable


def start_jax(*, debug: bool, say: Callable[[str], object] = print) -> None:
    """Sets JAX's options, and says so where this machine has an accelerator that JAX cannot see."""
    from jaxcoder import runtime

    runtime.initialize(debug=debug)
    unseen = runtime.check_accelerator()
    if unseen:
        say(unseen)
