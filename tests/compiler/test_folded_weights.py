"""Folded weights follow the weights they stand for; finalized ones are all that is left."""

from __future__ import annotations

import copy
import io
import os
import pickle
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler import edit_watch, fold_check, folded_weight, folded_weights
from sparsedm_compiler.compiler.edit_watch import HostSamples, WeightSample, sample_values
from tests.autotune.test_select_kernel import Net, X
from tests.compiler.nets import Chain
from tests.compiler.nets import X as CHAIN_X
from tests.oracle import OPTIONS, assert_same, oracle_of


def ask_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights are asked for later, as those on a card are."""
    for module in (folded_weight, folded_weights):
        monkeypatch.setattr(module, "is_asynchronous", lambda weight: True)


both = pytest.mark.parametrize("way", ["infer", "sparse"])


def folded(way: str, **options: Any) -> nn.Module:
    return sdm.compile(Net(), "2:4", backend="eager", **OPTIONS[way], **options)


@both
def test_folded_weights_after_every_kind_of_update_are_folded_again(way: str) -> None:
    fast = folded(way)
    tolerance = 1e-4 if way == "sparse" else 0.0
    fast(X)

    def check() -> None:
        assert_same(fast(X), oracle_of(fast)(X), tolerance=tolerance)

    with torch.no_grad():
        fast.plain.weight.mul_(-2)
    check()
    fast.plain.weight.data.add_(0.3)  # moves neither the version counter nor the storage
    check()
    fast.conv.weight.data.copy_(torch.randn_like(fast.conv.weight))
    check()
    fast.active.weight.data = torch.randn(16, 16)
    check()
    fast.twice.weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
    check()
    fast.conv.to(memory_format=torch.channels_last)
    check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("view", [False, True])
def test_samples_when_edited_past_the_version_counter_differ(
    dtype: torch.dtype, view: bool
) -> None:
    whole = torch.randn(3, 64, 48).to(dtype)
    weights = [w.t() if view else w for w in whole]
    samples = [WeightSample(now, now.clone()) for w in weights for now in [_sample(w)]]
    host = HostSamples(samples)
    assert all(host.hold() for _ in range(40))
    weights[1].data.mul_(2)
    assert not host.hold()
    weights[1].data.mul_(0.5)
    assert all(host.hold() for _ in range(40))
    _sample(weights[2])[5, 1] = 9  # a single value is seen when its turn comes
    assert [host.hold() for _ in range(16)].count(False) == 1
    assert HostSamples([]).hold()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    return sample_values(weight, spread=False)


def test_edit_of_one_weight_when_made_through_data_is_seen_by_the_next_call() -> None:
    fast = sdm.compile(Chain(), "2:4", backend="eager", **OPTIONS["infer"])
    with torch.no_grad():
        for _ in range(20):
            fast(CHAIN_X)
            fast.c.weight.data.mul_(1.5)
            assert_same(fast(CHAIN_X), oracle_of(fast)(CHAIN_X))


@both
def test_weight_edits_on_an_asynchronous_device_are_noticed_one_call_late(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask_devices(monkeypatch)
    monkeypatch.setattr("sparsedm_compiler.compiler.edit_watch.ASK_SECONDS", 0.0)
    fast = folded(way)
    tolerance = 1e-4 if way == "sparse" else 0.0
    before = fast(X)
    with torch.no_grad():
        fast.plain.weight.mul_(-2)  # a counter tells of it
    assert_same(fast(X), oracle_of(fast)(X), tolerance=tolerance)
    for edit in (lambda w: w.data.add_(0.3), lambda w: w.data.copy_(torch.randn_like(w))):
        before = fast(X)
        edit(fast.conv.weight)
        assert_same(fast(X), before)
        with pytest.warns(UserWarning, match=r"edited through \.data"):
            assert_same(fast(X), oracle_of(fast)(X), tolerance=tolerance)
        assert_same(fast(X), oracle_of(fast)(X), tolerance=tolerance)


def test_weight_edits_on_an_asynchronous_device_are_asked_for_now_and_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = "sparsedm_compiler.compiler"
    ask_devices(monkeypatch)
    clock = [100.0]
    monkeypatch.setattr(f"{path}.edit_watch.time.perf_counter", lambda: clock[0])
    fast = folded("infer")
    before = fast(X)
    fast(X)
    fast.conv.weight.data.add_(0.3)
    for _ in range(5):  # within 20 milliseconds: nothing is asked
        assert_same(fast(X), before)
    clock[0] += 0.021
    assert_same(fast(X), before)
    with pytest.warns(UserWarning, match=r"edited through \.data"):
        assert_same(fast(X), oracle_of(fast)(X))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_folded_weights_with_gaps_in_memory_when_edited_are_folded_again(
    asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asynchronous:
        ask_devices(monkeypatch)
        monkeypatch.setattr("sparsedm_compiler.compiler.edit_watch.ASK_SECONDS", 0.0)
    wide = torch.randn(16, 40)
    fast = folded("infer")
    fast.plain.weight = nn.Parameter(wide[:, 3:19], requires_grad=False)
    fast(X)
    if not asynchronous:
        wide.mul_(2)
    fast.plain.weight.data.add_(0.1)
    if asynchronous:
        fast(X)
        with pytest.warns(UserWarning, match=r"edited through \.data"):
            fast(X)
    assert_same(fast(X), oracle_of(fast)(X))


def test_an_answer_that_is_owed_is_not_asked_for_while_a_cuda_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weight = torch.ones(8)
    watcher = edit_watch.EditWatcher()
    state = 0, weight.data_ptr()
    fold = folded_weight.FoldedWeight(weakref.ref(weight), state, weight.clone() * 2, weight)
    watcher.ask([fold])
    assert watcher._watch is not None
    ((device, _),) = watcher._watch._devices
    device._is_cuda = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device._event = None  # which would be queried
    assert not watcher.take_report()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert watcher.take_report()
    assert not watcher.take_report()


def test_addresses_are_compared_at_positions_of_all_inputs() -> None:
    weights = {3: torch.ones(2), 5: torch.zeros(3)}
    inputs: list[Any] = [None, torch.ones(1), 2, weights[3], "x", weights[5], torch.ones(4)]
    addresses = [0, 0, 0, weights[3].data_ptr(), 0, weights[5].data_ptr()]
    by_torch = vars(torch._C).get("_tensors_data_ptrs_at_indices_equal")  # in builds for CUDA
    for compare in filter(None, (fold_check._lie_at_in_python, by_torch)):
        assert compare(inputs, addresses, [3, 5])
        assert not compare(inputs, [*addresses[:5], 0], [3, 5])
        assert compare(inputs, [], [])
    check = fold_check.FoldCheck(0, weights, weights, [])
    assert check.holds(inputs)
    assert check._addresses == addresses
    weights[5].set_(torch.zeros(3).untyped_storage())  # type: ignore[call-overload]
    assert not check.holds(inputs)


def test_folded_weights_of_several_graphs_are_shared() -> None:
    fast = folded("sparse")
    for batch in (1, 2, 3):
        fast(torch.randn(batch, 8, 16))
    folds = fast._sparsedm.weights
    assert len(folds) == 5


def finalized(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    fast = folded("sparse", finalize=True, **options)
    expected = folded("sparse")(X)
    assert_same(fast(X), expected)
    assert_same(fast(X), expected)
    return fast, expected


def test_finalized_weights_free_their_memory_and_still_run() -> None:
    fast, expected = finalized()
    assert fast.plain.weight.untyped_storage().nbytes() == 4
    assert bool(fast.plain.weight.isnan().all())
    assert fast.line.weight.untyped_storage().nbytes() == 16 * 16 * 4  # dense: masked in place
    assert_same(fast.line.weight, oracle_of(Reference.of(fast)).line.weight)
    found = {choice.weight: choice for choice in sdm.explain(fast).choices}
    plain = found["plain.weight"]
    assert plain.reason == "pinned by kernels="  # as chosen, not "finalized" by the next graph
    assert plain.dense_bytes == 16 * 16 * 4
    assert plain.run_bytes == fast._sparsedm.weights.packed["plain.weight"].data.nbytes
    assert "MiB dense" in str(sdm.explain(fast))
    other = torch.randn(5, 8, 16)
    assert_same(fast(other), folded("sparse")(other))
    assert_same(fast(X), expected)


def test_finalized_weights_under_autocast_run_unpacked_with_the_reason() -> None:
    fast, _ = finalized()
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = fast(X), folded("infer")(X)
    assert out.dtype == torch.bfloat16
    assert_same(out.float(), expected.float(), tolerance=0.05)
    reasons = {choice.weight: choice.reason for choice in sdm.explain(fast).choices}
    why = "unpacked: finalized in another dtype than it runs in here"
    assert reasons["plain.weight"] == why


class Reference:
    @staticmethod
    def of(fast: nn.Module) -> nn.Module:
        """A student that is not finalized, called once."""
        student = folded("sparse")
        student(X)
        return student


def test_state_dict_when_finalized_holds_masked_dense_weights() -> None:
    fast, _ = finalized()
    expected = oracle_of(Reference.of(fast)).state_dict()
    state = fast.state_dict()
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert_same(tensor, expected[name])


def test_copies_of_a_finalized_model_give_the_same_output() -> None:
    fast, expected = finalized()
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    for twin in (copy.deepcopy(fast), torch.load(file, weights_only=False)):
        assert_same(twin(X), expected)
        assert twin.plain.weight.untyped_storage().nbytes() == 4
    half = copy.deepcopy(fast).to(torch.bfloat16)
    assert half(X.bfloat16()).dtype == torch.bfloat16
    assert_same(half(X.bfloat16()).float(), expected, tolerance=0.05)


def test_finalized_model_when_saved_packed_loads_again(tmp_path: Path) -> None:
    fast, expected = finalized()
    sdm.save(fast, tmp_path / "packed")
    sdm.save(folded("sparse"), tmp_path / "dense")
    assert os.path.getsize(tmp_path / "packed") < os.path.getsize(tmp_path / "dense")
    assert "plain.weight" not in load_file(tmp_path / "packed")
    loaded = sdm.load(tmp_path / "packed", Net(), backend="eager")
    assert_same(loaded(X), expected)
    assert loaded.plain.weight.untyped_storage().nbytes() == 4
    with pytest.raises(sdm.CheckpointError, match="does not fit"):
        sdm.load(tmp_path / "packed", nn.Linear(4, 4))


def test_packed_file_when_damaged_is_refused(tmp_path: Path) -> None:
    from safetensors import safe_open

    fast, _ = finalized()
    sdm.save(fast, tmp_path / "file")
    with safe_open(tmp_path / "file", framework="pt") as file:
        meta = file.metadata()
    tensors = load_file(tmp_path / "file")
    tensors["plain.weight.sparsedm_packed"][600:] = 255
    save_file(tensors, tmp_path / "file", meta)
    with pytest.raises(sdm.CheckpointError, match="points outside"):
        sdm.load(tmp_path / "file", Net())


def test_finalized_weight_when_replaced_refuses_or_runs_the_new_values() -> None:
    fast, _ = finalized()
    fast.plain.weight = nn.Parameter(torch.randn(16, 16), requires_grad=False)
    plain = folded("sparse")
    plain.plain.weight = nn.Parameter(fast.plain.weight.clone(), requires_grad=False)
    assert_same(fast(X), plain(X))


def test_finalized_weights_are_looked_for_only_where_something_has_moved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fast, expected = finalized()
    fast(X), fast(X)
    walks = []
    walk = nn.Module.named_parameters

    def count(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        walks.append(self)
        return walk(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_parameters", count)
    for _ in range(3):
        assert_same(fast(X), expected)
    assert not walks
    fast.plain.weight.data = torch.full((16, 16), torch.nan)  # as a cast or a file leaves it
    assert_same(fast(X), expected)
    assert walks
    layer = copy.deepcopy(fast.plain)
    layer.weight.data = torch.full((16, 16), torch.nan)
    fast.plain = layer
    assert_same(fast(X), expected)
    assert fast.plain.weight.stride() == (0, 0)
    for _ in range(2):  # one captures the new layer, one finds nothing more to do
        assert_same(fast(X), expected)
    walks.clear()
    assert_same(fast(X), expected)
    assert not walks


def list_storages(module: nn.Module) -> dict[str, Any]:
    """Handles of the memory of all weights, which do not keep it."""
    return {
        name: StorageWeakRef(parameter.untyped_storage())
        for name, parameter in module.named_parameters()
        if parameter.dim() > 1
    }


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("way", ["infer", "sparse"])
def test_weights_of_a_model_that_is_moved_are_freed_with_what_was_folded(
    way: str, asynchronous: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asynchronous:
        ask_devices(monkeypatch)
        monkeypatch.setattr("sparsedm_compiler.compiler.edit_watch.ASK_SECONDS", 0.0)
    fast = folded(way)
    with torch.no_grad():
        expected = [fast(X) for _ in range(3)][-1]
        storages = list_storages(fast)
        weights = fast._sparsedm.weights
        forms = [weakref.ref(fold.folded) for fold in weights._folded.values()]
        assert len(forms) >= 4
        fast._apply(lambda x: x.clone())  # as .to(another device) does
        assert all(storage.expired() for storage in storages.values())
        assert not any(form() is not None for form in forms)
        assert not len(weights)
        for _ in range(2):
            assert_same(fast(X), expected)
        twin = copy.deepcopy(fast)
        assert_same(twin(X), expected)
        storages = list_storages(fast)
        twin.double().float()
        assert not any(storage.expired() for storage in storages.values())
        assert_same(twin(X), expected)
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        assert_same(torch.load(file, weights_only=False).double().float()(X), expected)


def test_weight_of_one_layer_that_is_moved_is_freed_by_the_next_call() -> None:
    fast = folded("sparse")
    with torch.no_grad():
        fast(X), fast(X)
        held = fast._sparsedm.weights._folded
        (form,) = [fold.folded for key, fold in held.items() if key[0] == id(fast.plain.weight)]
        before = weakref.ref(form)
        del form
        fast.plain.weight.data = fast.plain.weight.data.clone()
        fast(X)
        assert before() is None


def test_finalized_weights_are_freed_by_the_first_call_where_a_device_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask_devices(monkeypatch)
    monkeypatch.setattr("sparsedm_compiler.compiler.edit_watch.ASK_SECONDS", 0.0)
    fast = folded("sparse", finalize=True)
    storages = list_storages(fast)
    with torch.no_grad():
        fast(X)
    packed = fast._sparsedm.weights.packed
    assert len(packed) >= 4
    assert all(storages[name].expired() for name in packed)


def test_questions_to_devices_while_other_threads_fold_and_move_raise_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask_devices(monkeypatch)
    monkeypatch.setattr("sparsedm_compiler.compiler.edit_watch.ASK_SECONDS", 0.0)
    fast = folded("infer")
    with torch.no_grad():
        expected = fast(X)
    weights, errors = fast._sparsedm.weights, list[BaseException]()

    def repeat(work: Callable[[], object]) -> None:
        try:
            for _ in range(2000):
                work()
        except BaseException as error:
            errors.append(error)

    def refold() -> None:
        for key, held in [*weights._folded.items()]:
            weight = held.weight()
            if weight is not None:
                weights._folded.pop(key, None)
                weights.get(weight, key[1], "a weight")

    jobs = (weights.detect_edits, weights.ask_devices, weights.ask_devices, refold)
    jobs += (weights.release_moved, weights._watcher.forget)
    threads = [threading.Thread(target=repeat, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    with torch.no_grad():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
        assert not errors
        assert_same(fast(X), expected)


def test_a_model_from_a_pickle_frees_what_was_folded_when_it_is_moved() -> None:
    twin = pickle.loads(pickle.dumps(folded("infer")))
    with torch.no_grad():
        twin(X)
        assert len(twin._sparsedm.weights)
        twin.double()
    assert not len(twin._sparsedm.weights)
