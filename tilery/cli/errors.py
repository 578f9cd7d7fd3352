"""What a command raises when the user, and not the program, can mend it: one line on stderr, exit code 2."""


class CliError(Exception):
    """`str(error)` says what was wrong, what was expected, and what to do, in one line."""
