"""How a command ends."""

OK, FAILURE, USAGE, SOME_FAILED, CHECKPOINT, DEVICE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130


class CommandError(Exception):
    """Ends the command with a one-line message and an exit status of this module."""

    def __init__(self, message: str, status: int = USAGE):
        super().__init__(message)
        self.status = status
