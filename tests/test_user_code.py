"""The border to the user's code: one line and the user's own frame."""

from __future__ import annotations

import pickle
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hpsearch.errors import TrialDiverged, UserCodeError
from hpsearch.training.user_code import MAX_MESSAGE_CHARS, frame_of, is_out_of_memory, user_code


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., ModuleType]:
    """Runs a file of the user's, by default net.py, and gives its names."""

    def run_file(source: str, name: str = "net.py") -> ModuleType:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        module = ModuleType(path.stem)
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        return module

    return run_file


def caught(call: Callable[[], object], what: str = "model()") -> UserCodeError:
    with pytest.raises(UserCodeError) as info, user_code(what):
        call()
    return info.value


def test_exception_becomes_one_line_and_the_users_frame(run: Callable[..., ModuleType]) -> None:
    net = run("def model():\n    raise ValueError('width must be\\n   even')\n")
    assert str(caught(net.model)) == "error[task]: net.py:2 in model: ValueError: width must be even"


def test_frame_is_the_users_last_one_not_torchs(run: Callable[..., ModuleType]) -> None:
    net = run(
        """\
        import torch

        class Net(torch.nn.Module):
            def forward(self, x):
                return self.head(x)

            def head(self, x):
                return torch.nn.functional.linear(x, torch.zeros(3, 5))
        """
    )
    error = caught(lambda: net.Net()(torch.zeros(2, 4)), "forward()")
    assert error.frame == "net.py:8 in head"
    assert error.message.startswith("RuntimeError: mat1 and mat2 shapes cannot be multiplied")
    assert "torch/nn/modules/module.py" in error.traceback
    assert error.traceback.rstrip().endswith("(2x4 and 5x3)")


def test_frame_of_an_installed_task_is_in_its_own_file(run: Callable[..., ModuleType]) -> None:
    helper = run("def call(f):\n    return f()\n", "site-packages/other/helper.py")
    installed = run("def model(call):\n    return call(lambda: 1 / 0)\n", "site-packages/mine/net.py")
    with pytest.raises(UserCodeError) as info, user_code("model()"):
        installed.model(helper.call)
    # This test's own file lies outside site-packages, so it is the user's as well, and is asked first.
    assert info.value.frame.startswith("test_user_code.py:")


def test_a_frame_that_is_nobodys_is_named_with_what_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpsearch.training.user_code._is_own", lambda filename: False)
    error = caught(lambda: torch.zeros(2).reshape(3), "loss()")
    assert error.message == "RuntimeError: shape '[3]' is invalid for input of size 2 (from loss())"
    assert error.frame.startswith("test_user_code.py:")


def test_installed_file_is_the_users_where_no_other_is(
    run: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpsearch.training.user_code._is_own", lambda filename: False)
    helper = run(
        "def call(f):\n    return f()\n\ndef fail():\n    raise KeyError('width')\n", "site-packages/helper.py"
    )
    installed = run("def model(call, fail):\n    return call(fail)\n", "site-packages/net.py")
    error = caught(lambda: installed.model(helper.call, helper.fail))
    assert (error.frame, error.message) == ("net.py:2 in model", "KeyError: 'width'")


def test_syntax_error_names_its_line(run: Callable[..., ModuleType]) -> None:
    error = caught(lambda: run("x = 1\ny = (\n"), "import")
    assert (error.frame, error.message.partition(":")[0]) == ("net.py:2", "SyntaxError")


def test_sys_exit_in_user_code_does_not_end_the_worker() -> None:
    assert caught(lambda: sys.exit(3)).message == "SystemExit: 3"


def test_exception_without_text_is_named() -> None:
    def fail() -> None:
        raise AssertionError

    assert caught(fail).message == "AssertionError"


def test_long_message_is_cut() -> None:
    def fail() -> None:
        raise ValueError("x" * 5000)

    error = caught(fail)
    assert len(error.message) == MAX_MESSAGE_CHARS
    assert len(error.traceback) > 5000


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        TrialDiverged("loss is nan"),
        UserCodeError("named already", frame="net.py:1"),
    ],
    ids=repr,
)
def test_what_is_not_the_codes_fault_passes_as_it_is(error: BaseException) -> None:
    with pytest.raises(type(error)) as info, user_code("fit()"):
        raise error
    assert info.value is error


def test_other_errors_are_not_out_of_memory() -> None:
    assert not is_out_of_memory(ValueError("out of memory"))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_real_allocation_beyond_memory_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(info.value)


def test_user_code_is_a_decorator_too() -> None:
    @user_code("metrics()")
    def fail() -> None:
        raise StopIteration("no rows")

    with pytest.raises(UserCodeError, match=r"StopIteration: no rows"):
        fail()


def test_error_crosses_a_process_with_frame_and_traceback() -> None:
    error = pickle.loads(pickle.dumps(caught(lambda: 1 // 0)))
    assert (error.message, error.frame.partition(":")[0]) == (
        "ZeroDivisionError: integer division or modulo by zero",
        "test_user_code.py",
    )
    assert "ZeroDivisionError" in error.traceback


def test_frame_of_a_function_is_where_it_is_written() -> None:
    assert frame_of(test_frame_of_a_function_is_where_it_is_written).startswith("test_user_code.py:")
    assert frame_of(len) == ""
