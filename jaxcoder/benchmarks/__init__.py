"""Side-by-side measurements that a user can repeat: `jaxcoder bench ...`."""
