"""The `jaxcoder` command: `main.py` finds the verb, one small file per verb does the rest."""


def run_command() -> int:
    """The console script. Until `main.py` handles signals, Ctrl-C exits without a traceback."""
    from jaxcoder.runtime.signals import exit_on_ctrl_c

    exit_on_ctrl_c()
    from jaxcoder.cli.main import main

    return main()
