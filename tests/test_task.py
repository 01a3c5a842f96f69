"""The task: its defaults, and how it is found."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import hpsearch
from hpsearch.errors import SpecError, UserCodeError
from hpsearch.task import Report, Splits, Task, Trial, has_own_fit, load_task, outputs_of

WHOLE = """\
import hpsearch

class Digits(hpsearch.Task):
    def data(self):
        return hpsearch.Splits(train=None, val=None)

    def model(self, config):
        return None
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes files beside space.yaml; modules and paths that a test loads are forgotten after it."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))

    def write_file(name: str, source: str = WHOLE) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(source))
        return path

    return write_file


# Defaults


def test_integer_targets_mean_cross_entropy_and_accuracy() -> None:
    output, target = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]]), torch.tensor([0, 1, 1])
    task = Task()
    assert torch.equal(task.loss(output, target), functional.cross_entropy(output, target))
    assert {k: v.item() for k, v in task.metrics(output, target).items()} == {"accuracy": pytest.approx(2 / 3)}


def test_float_targets_mean_squared_error_and_mean_absolute_error() -> None:
    output, target = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([1.0, 4.0, 3.0])
    task = Task()
    assert task.loss(output, target).item() == pytest.approx(13 / 3)
    assert {k: v.item() for k, v in task.metrics(output, target).items()} == {"mae": pytest.approx(5 / 3)}


def test_binary_logits_mean_binary_cross_entropy_and_accuracy_at_one_half() -> None:
    class Labels(Task):
        outputs = "binary_logits"

    output, target = torch.tensor([[2.0, -1.0], [-3.0, 4.0]]), torch.tensor([[1, 0], [1, 1]])
    expected = functional.binary_cross_entropy_with_logits(output, target.float())
    assert torch.equal(Labels().loss(output, target), expected)
    assert Labels().metrics(output, target)["accuracy"].item() == 0.75


def test_outputs_follow_the_targets_unless_the_task_says() -> None:
    class Counts(Task):
        outputs = "values"

    assert outputs_of(Task(), torch.tensor([1])) == "logits"
    assert outputs_of(Task(), torch.tensor([1.0])) == "values"
    assert outputs_of(Counts(), torch.tensor([1])) == "values"


def test_augment_leaves_inputs_alone_by_default() -> None:
    x = torch.arange(3)
    assert Task().augment(x, torch.Generator()) is x


def test_task_has_a_loop_of_its_own_only_where_it_writes_one() -> None:
    class Own(Task):
        def fit(self, model: Any, config: Any, splits: Splits, trial: Trial) -> Iterator[Report]:
            yield Report({"val_loss": 1.0})

    assert has_own_fit(Own())
    assert not has_own_fit(Task())
    trial = Trial(epoch=0, state=None, number=1, seed=2, device=torch.device("cpu"))
    assert next(iter(Own().fit(None, {}, Splits(train=1, val=2), trial))).state is None


@pytest.mark.parametrize("method", ["data", "model", "fit"])
def test_method_that_is_not_written_says_so(method: str) -> None:
    class Digits(Task):
        pass

    arguments = {"data": (), "model": ({},), "fit": (None, {}, None, None)}[method]
    with pytest.raises(UserCodeError, match=rf"Digits has no {method}\(\)"):
        getattr(Digits(), method)(*arguments)


def test_optimizer_default_is_the_training_modules() -> None:
    layer = torch.nn.Linear(2, 1)
    optimizer = Task().optimizer(layer.parameters(), {"lr": 0.01, "optimizer": "sgd"})
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_the_task_api_loads_without_torch_or_numpy() -> None:
    program = "import hpsearch, sys; print(sorted({'torch', 'numpy', 'ray', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# Finding and loading


def test_file_beside_space_yaml_is_loaded(write: Callable[..., Path], tmp_path: Path) -> None:
    write("digits_task.py")
    task = load_task("digits_task.py:Digits", tmp_path)
    assert isinstance(task, hpsearch.Task)
    assert type(task).__module__ in sys.modules
    assert not (tmp_path / "__pycache__").exists()


def test_file_in_a_folder_is_loaded_with_its_neighbours(write: Callable[..., Path], tmp_path: Path) -> None:
    write("tasks/c1_neighbour.py", "WIDTH = 8\n")
    write("tasks/digits.py", "from c1_neighbour import WIDTH\n" + WHOLE + "    width = WIDTH\n")
    assert load_task("tasks/digits.py:Digits", tmp_path).width == 8  # type: ignore[attr-defined]


def test_module_in_a_package_beside_space_yaml_is_loaded(write: Callable[..., Path], tmp_path: Path) -> None:
    write("c1_package/__init__.py", "raise_if_imported = False\n")
    write("c1_package/inner/digits.py")  # a folder without __init__.py counts too
    assert type(load_task("c1_package.inner.digits:Digits", tmp_path)).__module__ == "c1_package.inner.digits"


def test_two_files_of_one_name_do_not_take_each_others_place(write: Callable[..., Path], tmp_path: Path) -> None:
    write("a/digits.py", WHOLE + "    where = 'a'\n")
    write("b/digits.py", WHOLE + "    where = 'b'\n")
    tasks = [load_task("digits.py:Digits", tmp_path / folder) for folder in "aba"]
    assert [task.where for task in tasks] == ["a", "b", "a"]  # type: ignore[attr-defined]
    assert type(tasks[0]) is type(tasks[2])


def test_file_changed_within_a_second_to_the_same_size_is_run_again(write: Callable[..., Path], tmp_path: Path) -> None:
    for width in (3, 4):
        write("digits.py", WHOLE + f"    width = {width}\n")
        assert load_task("digits.py:Digits", tmp_path).width == width  # type: ignore[attr-defined]


def problem_of(reference: str, folder: Path) -> str:
    with pytest.raises(SpecError) as info:
        load_task(reference, folder)
    assert len(info.value.problems) == 1
    return str(info.value.problems[0])


@pytest.mark.parametrize("reference", ["digits_task.py", "digits_task.py:", ":Digits", "digits_task.py:2", "a*:D", ""])
def test_reference_without_a_class_is_refused(tmp_path: Path, reference: str) -> None:
    assert problem_of(reference, tmp_path) == (
        f"error[task]: task: `{reference}` names no class\n  hint: write task: file.py:Class, or package.module:Class"
    )


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("digit_task.py:Digits", "error[task-file]: task: "),
        ("c1_nowhere.digits:Digits", "error[task-file]: task: "),
        ("digits_task.py:Digit", "error[task-class]: task: "),
        ("broken_task.py:Digits", "error[task-syntax]: "),
        ("binary_task.py:Digits", "error[task-syntax]: "),
    ],
)
def test_what_reading_tells_is_refused_before_anything_runs(
    write: Callable[..., Path], tmp_path: Path, reference: str, problem: str
) -> None:
    write("digits_task.py", "raise SystemExit('run')\n" + WHOLE)
    write("broken_task.py", "raise SystemExit('run')\nclass Digits(\n")
    (tmp_path / "binary_task.py").write_bytes(bytes(range(256)))
    assert problem_of(reference, tmp_path).startswith(problem)


def refusal(write: Callable[..., Path], tmp_path: Path, source: str) -> str:
    write("digits_task.py", source)
    with pytest.raises(UserCodeError) as info:
        load_task("digits_task.py:Digits", tmp_path)
    return str(info.value)


def test_file_that_raises_on_import_is_told_with_its_frame(write: Callable[..., Path], tmp_path: Path) -> None:
    before = {name for name in sys.modules if name.startswith("hpsearch_task_")}  # other tests' tasks
    text = refusal(write, tmp_path, "import nowhere_at_all\n" + WHOLE)
    assert text == ("error[task]: digits_task.py:1 in <module>: ModuleNotFoundError: No module named 'nowhere_at_all'")
    assert {name for name in sys.modules if name.startswith("hpsearch_task_")} == before


def test_file_that_exits_on_import_does_not_end_the_process(write: Callable[..., Path], tmp_path: Path) -> None:
    text = refusal(write, tmp_path, WHOLE + "\nimport sys\nsys.exit()\n")
    assert text == "error[task]: digits_task.py:11 in <module>: SystemExit"


def test_class_that_is_no_task_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    assert refusal(write, tmp_path, "class Digits(list): pass\n") == (
        "error[task]: Digits of digits_task.py is not an hpsearch.Task\n  hint: class Digits(hpsearch.Task):"
    )


def test_task_that_wants_arguments_is_refused(write: Callable[..., Path], tmp_path: Path) -> None:
    text = refusal(write, tmp_path, WHOLE + "\n    def __init__(self, folder):\n        pass\n")
    assert text == (
        "error[task]: Digits.__init__ takes arguments, but a task is made without any\n"
        "  hint: keep settings in class attributes, or in parameters of space.yaml with one value"
    )


def test_task_whose_arguments_have_defaults_is_made(write: Callable[..., Path], tmp_path: Path) -> None:
    write(
        "digits_task.py",
        WHOLE + "\n    def __init__(self, folder='.', *args, **kwargs):\n        self.folder = folder\n",
    )
    assert load_task("digits_task.py:Digits", tmp_path).folder == "."  # type: ignore[attr-defined]


def test_task_that_raises_when_made_is_told_with_its_frame(write: Callable[..., Path], tmp_path: Path) -> None:
    text = refusal(write, tmp_path, WHOLE + "\n    def __init__(self):\n        raise OSError('no data folder')\n")
    assert text == "error[task]: digits_task.py:11 in __init__: OSError: no data folder"


@pytest.mark.parametrize(
    ("method", "hint"), [("data", "it returns hpsearch.Splits"), ("model", "it returns a torch.nn.Module")]
)
def test_task_without_data_or_model_is_refused(
    write: Callable[..., Path], tmp_path: Path, method: str, hint: str
) -> None:
    text = refusal(write, tmp_path, WHOLE.replace(f"def {method}(", "def other("))
    assert text == f"error[task]: Digits has no {method}()\n  hint: {hint}"
