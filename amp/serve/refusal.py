"""Errors that the server answers with a status and one sentence."""


class Refusal(Exception):
    """A request that can't be answered. The message is written for the client.

    Attributes:
        status: HTTP status, such as 400.
        retry_after: Seconds after which the same request may succeed; None if it can't.
    """

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


def answer(status: int, message: str) -> dict:
    """Body of the answer to a refused request, in the form that vLLM uses."""
    return {"error": {"message": message, "code": status}}
