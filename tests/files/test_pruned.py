"""State_dicts of other pruning tools, in the layout that each writes, read with zeros in place."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import prune
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

import sparsedm_compiler as sdm
from sparsedm_compiler.files import check_file, convert_file, read_pruned
from sparsedm_compiler.models import UViT, load_weights
from tests.oracle import assert_same, brute_mask, hand_masked, masked_patterns

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor")

State = dict[str, Tensor]
PRUNED = ("1.weight", "2.weight")


def chain() -> nn.Sequential:
    """Returns four layers, of which tools prune the inner ones."""
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)])


X = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
EXPECTED = hand_masked(chain(), dict.fromkeys(PRUNED, "2:4")).state_dict()


def masks() -> State:
    return {name: brute_mask(chain().get_parameter(name), "2:4") for name in PRUNED}


def asp(*, recompute: bool) -> State:
    """Returns the state_dict under apex.contrib.sparsity.ASP, ``allow_recompute_mask`` or not."""
    state = dict(EXPECTED)
    for name, mask in masks().items():
        layer = name.removesuffix("weight")
        state[f"{layer}__weight_mma_mask"] = mask
        if recompute:
            state[f"{layer}__weight_mma_pruned_p"] = chain().state_dict()[name] * ~mask
    return state


def modelopt() -> State:
    """Returns the state_dict under modelopt.torch.sparsity (0.47), whose weights are not masked."""
    state = dict(chain().state_dict())
    return state | {n.replace("weight", "_weight_mask"): mask for n, mask in masks().items()}


def torch_prune() -> State:
    model = chain()
    for name, mask in masks().items():
        prune.custom_from_mask(model.get_submodule(name.removesuffix(".weight")), "weight", mask)
    return dict(model.state_dict())


def semi_structured() -> State:
    """Returns the state_dict after ``to_sparse_semi_structured``, torchao's ``sparsify_`` alike."""
    state = {name: tensor.half() for name, tensor in EXPECTED.items()}  # float32 would be 1:2
    for name in PRUNED:
        packed, meta = sparse_semi_structured_from_dense_cutlass(state[name])
        rest: tuple[None, None, None] = (None, None, None)
        state[name] = SparseSemiStructuredTensorCUTLASS(state[name].shape, packed, meta, *rest)
    return state


def sparsified() -> tuple[State, dict[str, Any]]:
    """Returns the state_dicts of a model and of its sparsifier, before ``squash_mask``."""
    model = chain()
    sparsifier = WeightNormSparsifier(1.0, sparse_block_shape=(1, 4), zeros_per_block=2)
    sparsifier.prepare(model, [{"tensor_fqn": name} for name in PRUNED])
    sparsifier.step()
    return dict(model.state_dict()), sparsifier.state_dict()


TOOLS: dict[str, Callable[[], State]] = {
    "apex ASP": lambda: asp(recompute=False),
    "apex ASP, recompute": lambda: asp(recompute=True),
    "ModelOpt": modelopt,
    "torch.nn.utils.prune": torch_prune,
    "zeros in place": lambda: dict(EXPECTED),
}
tools = pytest.mark.parametrize("tool", TOOLS)


def assert_expected(tensors: Mapping[str, Tensor]) -> None:
    assert tensors.keys() == EXPECTED.keys()
    for name, tensor in tensors.items():
        assert_same(tensor, EXPECTED[name])


@tools
def test_state_of_a_tool_when_read_is_the_masked_plain_one(tool: str, tmp_path: Path) -> None:
    state = TOOLS[tool]()
    torch.save(state, tmp_path / "w.pth")
    for source in (state, tmp_path / "w.pth"):
        pruned = read_pruned(source)
        assert_expected(pruned.tensors)
        assert {row.name: row.tool for row in pruned.rows} == dict.fromkeys(
            PRUNED, tool.removesuffix(", recompute")
        )
        assert {str(row.pattern) for row in pruned.rows} == {"2:4"}
        dense = tool in ("ModelOpt", "torch.nn.utils.prune")
        assert [row.dropped for row in pruned.rows] == [64 * 32 if dense else 0] * 2
    assert "1.weight" in state or tool == "torch.nn.utils.prune"  # the source is as it was


@tools
def test_state_of_a_tool_when_compiled_for_inference_runs_masked(tool: str) -> None:
    model = chain()
    model.load_state_dict(read_pruned(TOOLS[tool]()).tensors)
    fast = sdm.compile(model, mode="infer", backend="eager", kernels={"*": "dense"})
    oracle = hand_masked(chain(), dict.fromkeys(PRUNED, "2:4"))
    with torch.no_grad():
        assert_same(fast(X), oracle(X))
    assert masked_patterns(fast) == dict.fromkeys(PRUNED, sdm.Pattern.parse("2:4"))


@tools
def test_file_of_a_tool_is_checked_and_converted(tool: str, tmp_path: Path) -> None:
    torch.save(TOOLS[tool](), tmp_path / "w.pt")
    assert {row.name for row in check_file(tmp_path / "w.pt", "2:4").rows if row.fits} == {*PRUNED}
    convert_file(tmp_path / "w.pt", tmp_path / "w.safetensors", form="dense")
    assert_expected(load_file(tmp_path / "w.safetensors"))
    loaded = sdm.load(tmp_path / "w.safetensors", chain(), backend="eager")
    with torch.no_grad():
        assert_same(loaded(X), hand_masked(chain(), dict.fromkeys(PRUNED, "2:4"))(X))


def test_semi_structured_weights_are_expanded_where_they_can_be(tmp_path: Path) -> None:
    torch.save(semi_structured(), tmp_path / "w.pt")
    for source in (semi_structured(), tmp_path / "w.pt"):
        pruned = read_pruned(source)
        for name, tensor in pruned.tensors.items():
            assert type(tensor) is Tensor
            assert_same(tensor, EXPECTED[name].half())
        assert [(row.tool, str(row.pattern)) for row in pruned.rows] == [
            ("torch.sparse", "2:4")
        ] * 2


def test_modelopt_file_with_its_own_state_is_read(tmp_path: Path) -> None:
    config = {"config": {"nn.Linear": {"*": {}}}, "metadata": {"subnet_config": {}}}
    about = {"modelopt_state_dict": [("sparse_magnitude", config)], "modelopt_version": "0.47.0"}
    torch.save({"modelopt_state": about, "model_state_dict": modelopt()}, tmp_path / "m.pth")
    assert_expected(read_pruned(tmp_path / "m.pth").tensors)


def test_safetensors_of_a_wrapped_model_are_read_without_the_prefix(tmp_path: Path) -> None:
    names = {f"module._orig_mod.{name}": tensor for name, tensor in modelopt().items()}
    save_file(names, tmp_path / "w.safetensors")
    assert_expected(read_pruned(tmp_path / "w.safetensors").tensors)


def test_fake_sparsity_needs_the_masks_of_its_sparsifier(tmp_path: Path) -> None:
    state, sparsifier = sparsified()
    torch.save(state, tmp_path / "model.pt")
    torch.save(sparsifier, tmp_path / "masks.pt")
    for source, chosen in (
        (state, sparsifier),
        (tmp_path / "model.pt", tmp_path / "masks.pt"),
        (state, masks()),
    ):
        pruned = read_pruned(source, chosen)
        assert_expected(pruned.tensors)
        assert {row.tool for row in pruned.rows} == {"torch.ao.pruning"}
    convert_file(tmp_path / "model.pt", tmp_path / "w", form="dense", masks=tmp_path / "masks.pt")
    assert_expected(load_file(tmp_path / "w"))
    for read in (read_pruned, check_file):
        with pytest.raises(sdm.CheckpointError, match=r"'1.weight' is pruned by torch.ao.*masks="):
            read(tmp_path / "model.pt")
    assert_expected(read_pruned(EXPECTED, sparsifier).tensors)  # squashed already


def test_parametrizations_that_prune_nothing_are_left_as_they_are() -> None:
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    state = model.state_dict()
    assert read_pruned(state).tensors.keys() == state.keys()
    assert not read_pruned({"causal_mask": torch.ones(2), "x_orig": torch.ones(2)}).rows


W = torch.ones(2, 4)
BROKEN: dict[str, tuple[Any, str]] = {
    "mask alone": ({"a.__weight_mma_mask": W}, "a mask of apex ASP for 'a.weight', and no such"),
    "pruned values alone": ({"a.__weight_mma_pruned_p": W}, "pruned values of apex ASP for 'a.we"),
    "ModelOpt mask alone": ({"_weight_mask": W}, "a mask of ModelOpt for 'weight', and no such"),
    "shape": ({"weight": W, "_weight_mask": W[:1]}, r"is \[1, 4\], its weight \[2, 4\]"),
    "values": ({"weight": W, "_weight_mask": W / 2}, "holds more than zeros and ones"),
    "twice": ({"w": W, "w_orig": W, "w_mask": W}, "'w' is there twice, the second time as 'w_or"),
    "nested": ({"ema": {"a": W}, "step": 3}, "is no state_dict: it holds ema, step; take"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_state_is_refused_by_name(name: str, tmp_path: Path) -> None:
    state, message = BROKEN[name]
    torch.save(state, tmp_path / "w.pt")
    for source in (state, tmp_path / "w.pt"):
        with pytest.raises(sdm.CheckpointError, match=message):
            read_pruned(source)


def test_masks_of_unknown_weights_are_refused() -> None:
    with pytest.raises(sdm.CheckpointError, match=r"mask of torch.ao.pruning for 'gone.weight'"):
        read_pruned(EXPECTED, {"gone.weight": W})
    with pytest.raises(sdm.CheckpointError, match="masks is no state_dict: it holds step"):
        read_pruned(EXPECTED, {"step": 3})


def test_weights_packed_for_one_gpu_are_refused_with_the_way_out() -> None:
    packed = SparseSemiStructuredTensorCUSPARSELT(W.shape, W.flatten(), None, None, None, None)
    with pytest.raises(sdm.CheckpointError, match=r"packed by cuSPARSELt.*weight.to_dense\(\)"):
        read_pruned({"weight": packed})
    _, meta = sparse_semi_structured_from_dense_cutlass(EXPECTED["1.weight"])
    broken = SparseSemiStructuredTensorCUTLASS(W.shape, W, meta, None, None, None)
    with pytest.raises(sdm.CheckpointError, match="damaged semi-structured weight"):
        read_pruned({"weight": broken})


class Evil:
    """An object whose unpickling would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.path, "was run"))


def test_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"weight": W, "evil": Evil(tmp_path / "trace")}, tmp_path / "w.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(tmp_path / "trace")))
    torch.save(chain(), tmp_path / "module.pt")
    for name in ("w.pt", "raw.pt", "module.pt"):
        for read in (read_pruned, check_file):
            with pytest.raises(sdm.CheckpointError, match=f"cannot read weights from .*{name}"):
                read(tmp_path / name)
    assert not (tmp_path / "trace").exists()


def test_pickle_when_cut_or_changed_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({**sparsified()[1], "x": W}, path)
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        where = int(torch.randint(len(content), (1,), generator=generator))
        path.write_bytes(content[:where] + bytes([where % 256]) + content[where + 1 :])
        with suppress(sdm.SparseDMError):
            read_pruned(EXPECTED, path)
        path.write_bytes(content[:where])
        with pytest.raises(sdm.CheckpointError):
            read_pruned(path)


def test_file_of_ours_is_left_to_load(tmp_path: Path) -> None:
    student = sdm.compile(chain(), "2:4", backend="eager")
    student(X)
    sdm.save(student, tmp_path / "s.safetensors")
    with pytest.raises(sdm.CheckpointError, match=r"sparsedm_compiler.load reads"):
        read_pruned(tmp_path / "s.safetensors")


def test_report_of_what_was_read_counts_by_tool() -> None:
    text = str(read_pruned(modelopt()))
    assert "1.weight  64x64    ModelOpt     2:4        0.500    2048" in text
    assert text.endswith("2 pruned weights (2 by ModelOpt), 6 other tensors")
    assert str(read_pruned({"a": W})).endswith("0 pruned weights (none pruned), 1 other tensors")


UVIT = {"img_size": 8, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


def test_official_checkpoint_is_loaded_strictly_and_its_biases_named(tmp_path: Path) -> None:
    """SparseDM's training leaves latent weights, and a qkv bias that its teacher lacks."""
    torch.manual_seed(0)
    official = UViT(**UVIT, qkv_bias=True)
    nn.init.normal_(official.mid_block.attn.qkv.bias)
    torch.save(official.state_dict(), tmp_path / "nnet_ema.pth")
    says = r"unknown: in_blocks.0.attn.qkv.bias, .*build the model with qkv_bias=True"
    with pytest.raises(sdm.CheckpointError, match=says):
        load_weights(UViT(**UVIT), tmp_path / "nnet_ema.pth")
    loaded = load_weights(UViT(**UVIT, qkv_bias=True), tmp_path / "nnet_ema.pth")
    fast = sdm.compile(
        loaded, "2:4", mode="infer", policy="uvit", backend="eager", kernels={"*": "dense"}
    )
    x, t = torch.randn(1, 1, 8, 8), torch.tensor([3])
    with torch.no_grad():
        out = fast(x, t)
        assert_same(out, hand_masked(copy.deepcopy(official), masked_patterns(fast))(x, t))


@pytest.mark.parametrize("tool", ["apex ASP", "ModelOpt", "torch.nn.utils.prune"])
def test_masks_in_a_file_of_weights_are_told_from_a_misfit(tool: str, tmp_path: Path) -> None:
    torch.save(TOOLS[tool](), tmp_path / "w.pth")
    with pytest.raises(sdm.CheckpointError, match="masks of a pruning tool, which sparsedm conv"):
        load_weights(chain(), tmp_path / "w.pth")


ROW = torch.tensor([[1.0, 2.0, 0.0, 0.0]])
KEPT = ROW != 0
MISFITS: dict[str, tuple[Any, Any]] = {
    "neither a state_dict nor a file": (None, None),
    "'1' is sparse_coo": ({1: ROW.to_sparse()}, None),
    "'w' is on the meta device": ({"w": ROW.to("meta")}, None),
    "'w' of torch.ao.pruning is float8_e4m3fn": (
        {"w": ROW.to(torch.float8_e4m3fn)},
        {"w": KEPT},
    ),
    "'w' of torch.ao.pruning is int8": ({"w": ROW.to(torch.int8)}, {"w": KEPT}),
    "masks holds no mask": ({"w": ROW}, {"state": {}, "groups": []}),
    "list is neither": ({"w": ROW}, [KEPT]),
}


@pytest.mark.parametrize("says", MISFITS)
def test_state_when_it_holds_no_plain_weights_is_refused(says: str) -> None:
    source, given = MISFITS[says]
    with pytest.raises(sdm.CheckpointError, match=says):
        read_pruned(source, given)


def test_weights_in_float8_when_their_zeros_are_in_place_are_read() -> None:
    (row,) = read_pruned({"w": ROW.to(torch.float8_e4m3fn)}).rows
    assert (str(row.pattern), row.zeros) == ("2:4", 0.5)


def test_safetensors_when_written_under_the_name_of_a_pickle_are_refused(tmp_path: Path) -> None:
    save_file({"w": ROW}, tmp_path / "w.safetensors")
    with pytest.raises(sdm.ConfigError, match="would hold safetensors"):
        convert_file(tmp_path / "w.safetensors", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
