"""An error in one line."""

from __future__ import annotations


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the kind of the error if it has no message.

    Example:
        >>> first_line(ValueError("expected 2\\ngot 3")), first_line(ValueError())
        ('expected 2', 'ValueError')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def kind_and_first_line(error: BaseException) -> str:
    """The kind of an error before the first line of its message.

    An ``ImportError`` of this package says how to get what is missing, so its line stands alone.

    Example:
        >>> kind_and_first_line(RuntimeError("out of memory")), kind_and_first_line(KeyError())
        ('RuntimeError: out of memory', 'KeyError')
        >>> kind_and_first_line(ImportError("it needs the extra [bench]"))
        'it needs the extra [bench]'
    """
    line, kind = first_line(error), type(error).__name__
    return line if isinstance(error, ImportError) or line == kind else f"{kind}: {line}"
