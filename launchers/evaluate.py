"""`amp evaluate` as a script of the clone; its text and options are in amp/commands/evaluate.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.evaluate import main, parser

__all__ = ["main", "parser"]

if __name__ == "__main__":
    main()
