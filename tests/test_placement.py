"""Where workers fit, on clusters of all shapes, and what is said of those that never will."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpsearch.errors import UsageError
from hpsearch.fleets.placement import Ask, Autoscaler, Bundle, asked, fitting, in_words, prospect, refusal
from hpsearch.spec import Resources

CPU_NODE: Bundle = {"CPU": 8, "memory": 64e9, "node:10.0.0.1": 1}
GPU_NODE: Bundle = {"CPU": 8, "GPU": 4, "accelerator_type:A100": 1, "memory": 64e9}


def test_a_worker_asks_for_what_resources_say_and_for_no_zeros() -> None:
    assert asked(Resources()) == Ask(host={"CPU": 1.0})
    assert asked(Resources(cpus=2, gpus=0.25, custom={"highmem": 1})).host == {"CPU": 2.0, "GPU": 0.25, "highmem": 1.0}


def test_a_worker_that_asks_for_nothing_asks_for_a_grain_since_tune_places_nothing_else() -> None:
    assert asked(Resources(cpus=0)).host == {"CPU": 1e-4}


def test_a_group_holds_no_gpu_in_its_host_and_one_in_each_process() -> None:
    ask = asked(Resources(cpus=8, gpus=4, custom={"highmem": 1, "accelerator_type:A100": 0.001}))
    assert ask.host == {"CPU": 0.01}
    assert ask.members == ({"GPU": 1.0, "CPU": 1.9975, "highmem": 0.25, "accelerator_type:A100": 0.0003},) * 4


@given(
    cpus=st.floats(min_value=0, max_value=256, allow_nan=False),
    gpus=st.integers(min_value=2, max_value=16),
    amount=st.floats(min_value=1e-4, max_value=64),
)
def test_a_group_asks_for_no_more_cpus_than_its_worker_may_have(cpus: float, gpus: int, amount: float) -> None:
    ask = asked(Resources(cpus=cpus, gpus=gpus, custom={"highmem": amount}))
    assert len(ask.members) == gpus
    assert sum(bundle.get("CPU", 0.0) for bundle in ask.bundles) <= max(cpus, 1e-4) + 1e-9
    assert amount - 1e-9 <= sum(bundle["highmem"] for bundle in ask.members) <= amount + gpus * 1e-4


def test_workers_are_counted_by_node_not_by_the_clusters_total() -> None:
    """Two nodes of 3 cores have 6, and room for two workers of 2, not three."""
    assert fitting([{"CPU": 3}, {"CPU": 3}], asked(Resources(cpus=2))) == 2
    assert fitting([{"CPU": 1}] * 8, asked(Resources(cpus=2))) == 0


def test_a_worker_needs_all_it_asks_for_on_one_node() -> None:
    assert fitting([{"CPU": 8}, {"CPU": 1, "GPU": 1}], asked(Resources(cpus=4, gpus=1))) == 0


def test_shares_of_a_gpu_are_counted_without_rounding_errors() -> None:
    assert fitting([{"CPU": 64, "GPU": 1}], asked(Resources(cpus=0.1, gpus=0.1))) == 10


def test_custom_resources_are_counted() -> None:
    ask = asked(Resources(custom={"accelerator_type:A100": 0.001}))
    assert fitting([CPU_NODE, GPU_NODE], ask) == 8
    assert fitting([CPU_NODE, GPU_NODE], asked(Resources(custom={"highmem": 1}))) == 0


def test_processes_of_a_group_may_be_on_several_nodes() -> None:
    two_gpus: Bundle = {"CPU": 8, "GPU": 2}
    assert fitting([two_gpus, two_gpus], asked(Resources(cpus=4, gpus=4))) == 1
    assert fitting([two_gpus], asked(Resources(cpus=4, gpus=4))) == 0
    assert fitting([GPU_NODE, GPU_NODE, CPU_NODE], asked(Resources(cpus=4, gpus=4))) == 2


@given(
    nodes=st.lists(st.builds(lambda c, g: {"CPU": c, "GPU": g}, st.integers(0, 32), st.integers(0, 8)), max_size=6),
    gpus=st.integers(min_value=2, max_value=4),
)
def test_groups_never_take_more_than_there_is(nodes: list[dict[str, int]], gpus: int) -> None:
    ask = asked(Resources(cpus=gpus, gpus=gpus))
    n = fitting(nodes, ask)
    assert n * gpus <= sum(node["GPU"] for node in nodes)
    assert n * gpus <= sum(node["CPU"] for node in nodes) + 1e-6


def test_without_an_autoscaler_what_does_not_fit_never_will() -> None:
    ask = asked(Resources(gpus=1))
    assert prospect([CPU_NODE], ask, None) == "never"
    assert prospect([GPU_NODE], ask, None) == "fits"
    assert prospect([], ask, None) == "never"


def test_an_autoscaler_with_a_fitting_kind_of_node_may_bring_it() -> None:
    ask = asked(Resources(gpus=1))
    assert prospect([CPU_NODE], ask, Autoscaler(node_types=(CPU_NODE, GPU_NODE))) == "may-come"
    assert prospect([CPU_NODE], ask, Autoscaler(node_types=(CPU_NODE,))) == "never"


def test_an_autoscaler_that_is_silent_may_bring_anything_until_it_refuses() -> None:
    ask = asked(Resources(gpus=1))
    assert prospect([CPU_NODE], ask, Autoscaler()) == "may-come"
    assert prospect([CPU_NODE], ask, Autoscaler(refused=({"CPU": 1.0, "GPU": 1.0},))) == "never"
    assert prospect([CPU_NODE], ask, Autoscaler(refused=({"CPU": 1.0, "GPU": 8.0},))) == "may-come"  # another's


def test_of_a_group_each_process_needs_a_kind_of_node() -> None:
    ask = asked(Resources(cpus=4, gpus=2))
    assert prospect([CPU_NODE], ask, Autoscaler(node_types=({"CPU": 4, "GPU": 1},))) == "may-come"
    assert prospect([CPU_NODE], ask, Autoscaler(node_types=({"CPU": 1, "GPU": 1},))) == "never"


@pytest.mark.parametrize(
    ("resources", "nodes", "scaler", "message", "hint"),
    [
        (
            Resources(cpus=4000),
            [CPU_NODE, GPU_NODE],
            None,
            "a worker asks for 4000 CPU; the most that a node has is 8 CPU",
            "lower resources.cpus in space.yaml, or add a node that has it",
        ),
        (
            Resources(gpus=1, custom={"highmem": 2}),
            [CPU_NODE, {"CPU": 2, "highmem": 1}],
            None,
            "a worker asks for 1 CPU, 1 GPU, 2 highmem; the most that a node has is no GPU, 1 highmem",
            "lower resources.custom or resources.gpus in space.yaml, or add a node that has it",
        ),
        (
            Resources(cpus=4, gpus=1),
            [CPU_NODE, {"CPU": 2, "GPU": 1}],
            None,
            "a worker asks for 4 CPU, 1 GPU; no node has them together; all nodes have 10 CPU, 1 GPU",
            "lower resources.cpus or resources.gpus in space.yaml, or add a node that has it",
        ),
        (
            Resources(cpus=16, gpus=8),
            [GPU_NODE],
            None,
            "a worker asks for 8 times 1 GPU, 1.9987 CPU; no node has them together; all nodes have 4 GPU, 8 CPU",
            "lower resources.cpus or resources.gpus in space.yaml, or add a node that has it",
        ),
        (
            Resources(gpus=0.5),
            [CPU_NODE],
            Autoscaler(node_types=({"CPU": 4, "GPU": 0.25},)),
            "a worker asks for 1 CPU, 0.5 GPU; "
            "the most that a node has, or one that the autoscaler brings, is 0.25 GPU",
            "lower resources.gpus in space.yaml, or add a node that has it",
        ),
    ],
)
def test_refusal_names_what_was_asked_and_the_most_any_node_has(
    resources: Resources, nodes: list[Bundle], scaler: Autoscaler | None, message: str, hint: str
) -> None:
    error = refusal(nodes, asked(resources), own_machine=False, autoscaler=scaler)
    assert (type(error), error.exit_code, error.message, error.hint) == (UsageError, 2, message, hint)


def test_refusal_on_ones_own_machine_names_a_cluster() -> None:
    error = refusal([{"CPU": 2}], asked(Resources(gpus=1)), own_machine=True)
    assert error.message == "a worker asks for 1 CPU, 1 GPU; this machine has no GPU"
    assert error.hint == "lower resources.gpus in space.yaml, or name a cluster with --address"


def test_what_is_asked_for_is_said_as_people_say_it() -> None:
    assert in_words(asked(Resources(gpus=0.25, custom={"highmem": 1}))) == "1 CPU, 0.25 GPU, 1 highmem"
    assert in_words(asked(Resources(cpus=0, gpus=4))) == "4 times 1 GPU"
