"""The border to the user's code: what it raises becomes a message and the user's own frame.

Everything of the user's that hpsearch calls is called inside `user_code`. What comes out is one line that says what
went wrong and where in *their* files; the whole traceback is kept beside it for the journal.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import FrameSummary
from types import CodeType

import hpsearch
from hpsearch.errors import HpsearchError, UserCodeError

MAX_MESSAGE_CHARS = 1000  # a message is printed and journalled; the traceback holds the rest

_STDLIB = Path(sysconfig.get_path("stdlib"))
_HPSEARCH = Path(hpsearch.__file__).parent
_INSTALLED = {"site-packages", "dist-packages"}


@contextmanager
def user_code(what: str) -> Iterator[None]:
    """Turns what the user's code raises into a UserCodeError; a context manager, or a decorator.

    The error's message is the exception, as in `ValueError: width must be even`; its frame the last one in the user's
    own files, as in `digits_task.py:12 in model`; its traceback the full text. sys.exit() counts as raising.

    Passes as they are: KeyboardInterrupt, hpsearch's own errors, and memory that ran out (of the host or a device),
    since that is the config's doing and is retried.

    Args:
        what: what of the user's is called, e.g. "model()"; told when none of the frames is the user's.

    Raises:
        UserCodeError
    """
    try:
        yield
    except HpsearchError:
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        frame = user_frame(error)
        message = describe(error)
        raise UserCodeError(
            message if frame else f"{message} (from {what})",
            frame=frame or _last_frame(error),
            traceback="".join(traceback.format_exception(error)),
        ) from error


def describe(error: BaseException) -> str:
    """The exception on one line: `ValueError: width must be even`."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= MAX_MESSAGE_CHARS else line[: MAX_MESSAGE_CHARS - 2] + " …"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory, of the host or of a device, ran out.

    Told by name and message, for torch raises several types, and some of them only where CUDA is built in.
    """
    if isinstance(error, MemoryError) or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__):
        return True
    signs = ("out of memory", "DefaultCPUAllocator: can't allocate", "DefaultCPUAllocator: not enough", "_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def user_frame(error: BaseException) -> str:
    """The last frame that lies in the user's own files, as `digits_task.py:12 in model`; "" when there is none.

    A file is the user's unless it is installed, Python's, or ours. A task may itself be installed: when no frame is
    in a file of the first kind, the file that hpsearch called first is taken for the user's.
    """
    if isinstance(error, SyntaxError) and error.filename and _is_own(error.filename):
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(frame.filename)]
    if not own:
        called = [frame for frame in frames if _is_foreign(frame.filename)]
        own = [frame for frame in called if frame.filename == called[0].filename]
    return _written(own[-1]) if own else ""


def frame_of(function: Callable[..., object]) -> str:
    """Where a function of the user's is written, in the same words; "" for one that has no source."""
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return ""
    return f"{Path(code.co_filename).name}:{code.co_firstlineno} in {code.co_name}"


def frame_told(error: UserCodeError, model: Callable[..., object]) -> str:
    """Where to look: the error's frame; where only torch's layers stand there, the method that put them together.

    Args:
        model: the task's method of that name.
    """
    name = error.frame.split(":")[0]
    places = [line for line in error.traceback.splitlines() if line.strip().startswith('File "') and name in line]
    if places and all("/torch/" in place for place in places):
        return frame_of(model)
    return error.frame


def _last_frame(error: BaseException) -> str:
    """The last frame that is not ours, which only called or watched; ours where there is no other."""
    frames = traceback.extract_tb(error.__traceback__)
    others = [frame for frame in frames if not Path(frame.filename).is_relative_to(_HPSEARCH)]
    return _written((others or frames)[-1]) if frames else ""


def _written(frame: FrameSummary) -> str:
    return f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def _is_own(filename: str) -> bool:
    path = Path(filename)
    if filename.startswith("<") or _INSTALLED.intersection(path.parts):
        return False
    return not (path.is_relative_to(_STDLIB) or path.is_relative_to(_HPSEARCH))


def _is_foreign(filename: str) -> bool:
    """Installed, but neither Python's, torch's nor ours."""
    path = Path(filename)
    if filename.startswith("<") or path.is_relative_to(_HPSEARCH):
        return False
    installed = _INSTALLED.intersection(path.parts)
    return bool(installed) and "torch" not in path.parts
