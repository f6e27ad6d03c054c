"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """A mistake in the user's input: one line that says what is wrong, where, and what to do.

    The command line prints the message alone, without a traceback, and exits with status 2. Anything else that is
    raised is a defect of Flexpert's own and keeps its traceback.

    Args:
        message: the line.
        told: another process of the stage tells it.
        status: exit status.
    """

    def __init__(self, message: str, told: bool = False, status: int = 2) -> None:
        super().__init__(message)
        self.told, self.status = told, status
