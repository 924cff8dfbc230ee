"""The `jaxcoder` command: `main.py` finds the verb, one small file per verb does the rest."""


def run_command() -> int:
    """The console script. Until `main.py` is imported, Ctrl-C exits without a traceback."""
    import os
    import signal

    from jaxcoder.errors import EXIT_CTRL_C

    def stop(*_: object) -> None:
        os.write(2, b"\njaxcoder: stopped by Ctrl-C.\n")
        os._exit(EXIT_CTRL_C)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    from jaxcoder.cli.main import main

    return main()
