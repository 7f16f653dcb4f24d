"""Calls from several threads: each runs masked, whatever the others do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import sparsedm_compiler as sdm
from tests.compiler.nets import Chain
from tests.compiler.test_graph_breaks import LENGTHS, Ragged, Uncovered, UncoveredCast
from tests.oracle import OPTIONS, ROUNDING, assert_same, oracle_of

X = torch.linspace(-1, 1, 48).reshape(3, 16)
modes = pytest.mark.parametrize("mode", ["train", "infer", "sparse"])


class Steady(Chain):
    """Has a method beside forward."""

    def features(self, x: Tensor) -> Tensor:
        return self.c(self.b(x))  # type: ignore[no-any-return]


def in_threads(*jobs: Callable[[], None]) -> None:
    """Runs jobs at the same time, and raises the first error of theirs."""
    errors: list[BaseException] = []
    together = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            together.wait()
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@modes
@pytest.mark.parametrize("kind", [Uncovered, UncoveredCast])
def test_weights_masked_in_python_stay_so_while_another_thread_compiles(
    kind: type[Ragged], mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    student = sdm.compile(kind(), "2:4", backend="eager", **OPTIONS[mode])
    student(X, LENGTHS)
    torch.manual_seed(1)
    out = student(X, LENGTHS)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)  # torch's, of all threads
    torch.manual_seed(1)
    assert_same(student(X, LENGTHS), out)
    monkeypatch.undo()
    torch.manual_seed(1)
    assert_same(out, oracle_of(student)(X, LENGTHS), tolerance=ROUNDING[mode])


@modes
def test_first_call_while_another_thread_compiles_decides_as_any(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = sdm.compile(Uncovered(), "2:4", backend="eager", **OPTIONS[mode])
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    student(X, LENGTHS)
    monkeypatch.undo()
    assert set(sdm.explain(student).masked) == {"b.weight", "c.weight"}


def hold(student: nn.Module, runs: threading.Event, done: threading.Event) -> None:
    """Runs the model from ``runs`` to ``done``, as far as its guard can tell."""
    with student._sparsedm.guard:
        runs.set()
        done.wait()


@modes
def test_layer_called_by_itself_while_another_thread_runs_the_model_raises(mode: str) -> None:
    student = sdm.compile(Steady(), "2:4", backend="eager", **OPTIONS[mode])
    student(X)
    runs, done = threading.Event(), threading.Event()

    def call() -> None:
        runs.wait()
        try:
            with pytest.raises(sdm.DenseRunError, match="outside of the calls of the compiled"):
                student.b(X)
        finally:
            done.set()

    in_threads(partial(hold, student, runs, done), call)


@modes
def test_method_when_another_thread_runs_the_model_and_one_compiles_runs_masked(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = sdm.compile(Steady(), "2:4", backend="eager", **OPTIONS[mode])
    student(X)
    runs, done = threading.Event(), threading.Event()

    def call() -> None:
        runs.wait()
        monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
        try:
            out = student.features(X)
        finally:
            monkeypatch.undo()
            done.set()
        assert_same(out, oracle_of(student).features(X), tolerance=ROUNDING[mode])

    in_threads(partial(hold, student, runs, done), call)


@modes
@pytest.mark.parametrize("kind", [Ragged, Uncovered, Steady])
def test_first_calls_from_threads_run_masked(kind: type[Ragged], mode: str) -> None:
    student = sdm.compile(kind(), "2:4", backend="eager", **OPTIONS[mode])
    args = () if kind is Steady else (LENGTHS,)
    outs: dict[int, list[Tensor]] = {n: [] for n in range(1, 5)}

    def call(rows: int) -> None:
        for _ in range(3):
            outs[rows].append(student(X[:1].repeat(rows, 1), *args))

    in_threads(*(lambda rows=rows: call(rows) for rows in outs))  # type: ignore[misc]
    expected = oracle_of(student)(X[:1], *args)
    for rows, results in outs.items():
        for out in results:
            assert_same(out, expected.expand(rows, -1), tolerance=max(1e-5, ROUNDING[mode]))
