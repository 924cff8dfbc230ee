"""The `jaxcoder` command: `main.py` finds the verb, one small file per verb does the rest."""
