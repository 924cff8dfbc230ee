"""The laboratory: measurements that back design decisions. Run from a checkout, never imported by the package."""
