"""Command lines: wrong ones are refused in one short error, and no secret of theirs is shown."""

from jsonargparse import ArgumentParser

from amp.errors import printable, without_secrets


class CommandLine(ArgumentParser):
    """`jsonargparse.ArgumentParser` for values that may be hostile; takes the same arguments.

    YAML is read by a safe loader, and none of our settings has a type whose ``class_path`` could be chosen.
    """

    def parse_args(self, *arguments, **options):
        try:
            return super().parse_args(*arguments, **options)
        except (RecursionError, TypeError, ValueError) as error:  # lists in lists; a number of thousands of digits
            self.error(f"a value can't be read ({type(error).__name__}: {error})")

    def instantiate(self, *arguments, **options):
        try:
            return super().instantiate(*arguments, **options)
        except TypeError as error:  # a list in place of a group of settings
            self.error(f"a value is of the wrong type ({error})")

    def error(self, message, *arguments, **options):
        lines = without_secrets(str(message)).split("\n")
        return super().error("\n".join(printable(line) for line in lines), *arguments, **options)
