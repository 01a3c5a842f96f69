"""One winner everywhere: what chose it, and that every place names the same one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hpsearch.cli.run_verbs import best_text, top_table
from hpsearch.cli.verdict_text import verdict_text
from hpsearch.events import Compared, Confirmed, Evaluated, Event, Finished, Opened, Selected, StageBegan, StageEnded
from hpsearch.sentences import baseline_lines, ensemble_line, gain_line, training_line, winner_line
from hpsearch.state import StudyState
from hpsearch.tracker.operations import note_text
from hpsearch.verdict import top, verdict
from hpsearch.winner import winner
from tests import fakes
from tests.test_confirm_stage import run
from tests.test_verdict import GAIN, SPEC, losses, state_of, trained

ACCURACY = {**SPEC, "metric": {"name": "val_accuracy", "goal": "maximize"}}
SEARCH: list[Event] = [
    StageBegan(stage="search"),
    *trained(0, losses(0.5, 0.3, 0.4)),
    *trained(1, losses(0.6, 0.2)),
    *trained(2, losses(0.4)),
    StageEnded(stage="search"),
]


def folds_row(trial: int, mean: float, corrected: float) -> dict[str, object]:
    return {
        "trial": trial, "searched": 0.8, "mean": mean, "corrected": corrected, "low": corrected - 0.1,
        "high": corrected + 0.1, "epoch": 2, "folds": 5, "scores": [mean] * 5, "chance": 0.5,
    }  # fmt: skip


def seeds_row(trial: int, mean: float, confirmed: float) -> dict[str, object]:
    return {
        "trial": trial, "searched": 0.8, "mean": mean, "confirmed": confirmed, "low": confirmed - 0.1,
        "high": confirmed + 0.1, "optimism": 0.0, "seeds": 3, "chance": 0.5,
    }  # fmt: skip


FOLDS = Evaluated(
    epoch_of_search=6, folds=5, repeats=1, standings=(folds_row(1, 0.75, 0.71), folds_row(0, 0.74, 0.74)), out=()
)
SEEDS = Confirmed(epoch_of_search=6, standings=(seeds_row(0, 0.9, 0.85), seeds_row(1, 0.88, 0.88)), out=())


def chosen(*more: Event, best: int = 0, members: tuple[tuple[int, float], ...] = ((1, 1.0),)) -> StudyState:
    selected = Selected(n_trials=3, best=best, pool=(1, 0, 2), members=members)
    return state_of(*SEARCH, *more, selected, spec=ACCURACY)


def text_of(state: StudyState) -> str:
    outcome = verdict(state, run_dir="runs/d", wall_s=0.0, stages_s={}, mlflow={})
    return verdict_text(state, outcome, None, None)


def test_last_word_decides_seeds_before_folds_before_the_search() -> None:
    rules = [winner_line(chosen(best=1)), winner_line(chosen(FOLDS, best=1)), winner_line(chosen(FOLDS, SEEDS))]
    assert rules == [
        "best trial 1: chosen by its val_accuracy in the search, 0.8: first of 3",
        "best trial 1: chosen by the mean accuracy of 5 folds, 0.75: first of 2",
        "best trial 0: chosen by the mean accuracy of 3 fresh seeds, 0.9: first of 2; the search had trial 1 first",
    ]


def test_winner_is_the_leader_so_far_until_the_ensemble_is_chosen() -> None:
    for events, trial in (((), 1), ((FOLDS,), 1), ((FOLDS, SEEDS), 0)):
        found = winner(state_of(*SEARCH, *events, spec=ACCURACY))
        assert found is not None
        assert (found.trial, found.final) == (trial, False)
    assert winner(state_of()) is None


def test_winner_whose_better_is_gone_says_so() -> None:
    found = winner(chosen(SEEDS, best=1))
    assert found is not None
    assert found.rule == "chosen by the mean accuracy of 3 fresh seeds, 0.88: number 2, whose betters are gone, of 2"


def test_tables_of_the_report_show_the_mean_that_ranks_and_what_being_first_is_worth() -> None:
    text = text_of(chosen(FOLDS, SEEDS))
    assert "mean accuracy of folds" in text
    assert "0.75 [0.61, 0.81]" in text
    assert "the first of 2 is flattered by being so: 0.71 is expected of it" in text
    assert "0.9 [0.75, 0.95]" in text
    assert "the first of 2 is flattered by being so: 0.85 is expected of it" in text
    assert "trial 0, epoch 2 (its best val_accuracy): lr=0.1" in text
    assert winner_line(chosen(FOLDS, SEEDS)) in text.splitlines()


def test_status_tells_the_winner_and_the_searched_best_as_such() -> None:
    state = chosen(SEEDS)
    found = winner(state)
    assert found is not None
    first, rule, searched = best_text(state, found).splitlines()
    assert first.startswith("best trial 0 at epoch 2: ")
    assert rule == f"  {found.rule}"
    assert searched.startswith("  by the search alone: trial 1 at epoch 2: ")


def test_top_stays_a_ranking_of_the_search_with_the_winner_marked() -> None:
    state = chosen(SEEDS)
    assert [(row["trial"], row["winner"]) for row in top(state)] == [(1, False), (0, True), (2, False)]
    assert "0 (winner)" in top_table(state, 3)
    assert "winner" not in top_table(state_of(*SEARCH, spec=ACCURACY), 3)


def test_ensemble_of_one_trial_is_called_so_and_told_whether_it_was_looked_into() -> None:
    alone = "the ensemble is trial 2 alone: no other checkpoint improved it on the rows set aside for choosing"
    members = ((2, 1.0),)
    assert (
        ensemble_line(chosen(FOLDS, SEEDS, members=members)) == f"{alone}; it was neither cross-validated nor confirmed"
    )
    assert ensemble_line(chosen(SEEDS, members=members)) == f"{alone}; it was not confirmed"
    assert ensemble_line(chosen(members=members)) == alone
    assert ensemble_line(chosen(FOLDS, SEEDS)).endswith("; it was cross-validated and confirmed")
    assert ensemble_line(chosen(members=((1, 0.5), (2, 0.5)))) == ""
    assert gain_line(chosen(members=members), GAIN) == "trial 2 − best trial, test loss: -0.02 [-0.03, -0.01]: better"


def test_note_of_mlflow_names_the_winner_with_folds_seeds_and_baselines_in_the_words_of_the_report() -> None:
    constant = Finished(
        key="baseline/constant", worker="w", outcome="done", values={"metrics": {"val": {"accuracy": 0.1}}}
    )
    state = chosen(FOLDS, SEEDS, constant)
    undecided = {"metric": "accuracy", "value": 0.01, "low": -0.1, "high": 0.1, "better": None}
    for event in (Compared(n_trials=3, gain=undecided), StageEnded(stage="ensemble")):
        state.apply(event, 99.0)
    text = note_text(state, [])
    assert f"**Best trial**: 0, val_accuracy 0.7 at epoch 2: {winner_line(state).partition(': ')[2]}." in text
    assert "**Cross-validated**, by the mean accuracy: trial 1 0.75 [0.61, 0.81], trial 0 0.74 [0.64, 0.84]." in text
    assert "**Confirmed with fresh seeds**, by the mean accuracy: trial 0 0.9 [0.75, 0.95]" in text
    assert "**Ensemble**: trial 1 alone: no other checkpoint improved it" in text
    assert "no difference that this test split can show" in text
    assert "undecided" not in text
    assert "- baseline, ignoring the inputs: val accuracy 0.1" in text


def test_linear_model_that_is_as_good_is_told_in_words() -> None:
    over = {"metric": "loss", "value": 0.008, "low": -0.02, "high": 0.03, "split": "test", "n_rows": 450}
    words = []
    for more in ({"better": None}, {"better": False, "low": 0.002}, {"better": True}, {"better": None, "low": None}):
        state = chosen()
        state.apply(Compared(n_trials=3, gain={}, over_linear={**over, **more}), 99.0)
        words.append([line for line in text_of(state).splitlines() if "linear" in line])
    by = "best trial − linear model, test loss: 0.008"
    assert words == [
        [f"note: a linear model is as good as the best trial, as far as 450 rows can show: {by} [-0.02, 0.03]"],
        [f"note: a linear model is better than the best trial: {by} [0.002, 0.03]"],
        [],
        [f"note: whether the best trial beats a linear model is undecided: {by}; too few rows for an interval"],
    ]


def test_report_and_status_tell_in_one_line_whether_trials_shared_a_program_and_its_precision() -> None:
    spec = {**ACCURACY, "precision": "bf16", "resources": {"lanes": 8}}
    lines = []
    for shared in ({}, {1: 3, 2: 2}):
        state = StudyState()
        for event in (Opened(study="digits", uid="u", spec=spec, spec_text=""), *SEARCH):
            if isinstance(event, Finished) and event.trial in shared:
                event = dataclasses.replace(event, values={**event.values, "lanes": shared[event.trial]})
            state.apply(event, 1.0)
        assert training_line(state) == text_of(state).splitlines()[1]
        lines.append(training_line(state))
    assert lines == [
        "lanes: none, each trial was trained by itself; precision: bf16",
        "lanes: 2 of 3 trials shared a program, up to 3 at once; precision: bf16",
    ]
    assert training_line(state_of(*SEARCH, spec={**SPEC, "resources": {"lanes": 1}})) == ""


def test_best_trial_is_held_against_the_linear_model_row_by_row_on_the_test_split(tmp_path: Path) -> None:
    state = run(tmp_path)
    assert state.compared is not None
    over = state.compared.over_linear
    assert (over["metric"], over["split"], over["n_rows"], over["better"]) == ("loss", "test", fakes.N_ROWS, True)
    assert float(str(over["low"])) < float(str(over["value"])) < float(str(over["high"])) < 0
    assert "linear model is" not in "".join(baseline_lines(state))
    told = verdict(state, run_dir="", wall_s=0.0, stages_s={}, mlflow={})["baselines"]
    assert isinstance(told, dict)
    assert told["gain_over_linear"] == over
