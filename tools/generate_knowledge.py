"""`amp generate_knowledge` as a script of the clone; its text and options are in amp/commands/generate_knowledge.py."""

from amp.errors import exit_on_error

with exit_on_error():
    from amp.commands.generate_knowledge import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
