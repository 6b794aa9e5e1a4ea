"""Errors for arguments that other projects' losses have and these do not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

Parameters = ParamSpec("Parameters")
Constructor = Callable[Parameters, None]


def refer(**references: str) -> Callable[[Constructor[Parameters]], Constructor[Parameters]]:
    """Say where to find what an unknown argument asks for.

    Args:
        references: By the name of such an argument, the sentence that ends Python's own error.
    """

    def decorate(constructor: Constructor[Parameters]) -> Constructor[Parameters]:
        @functools.wraps(constructor)
        def checked(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
            for name in kwargs:
                if name in references:
                    raise TypeError(
                        f"{constructor.__qualname__}() got an unexpected keyword argument "
                        f"{name!r}: {references[name]}"
                    )
            constructor(*args, **kwargs)

        return checked

    return decorate
