"""Models that ``from_pretrained`` prunes: loaded, saved, trained, and refused."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.quantizers import PipelineQuantizationConfig, auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

import sparsedm_compiler as sdm
from sparsedm_compiler.compiler.held_masks import SoftMasks
from sparsedm_compiler.diffusers import attach
from sparsedm_compiler.diffusers.quantizer import SparseQuantizer
from sparsedm_compiler.diffusers.registration import METHOD, TESTED, import_base, list_tables
from tests.compiler.nets import UNET, assert_masked, run_unet
from tests.diffusers.cases import run, saved_unet, small_unet
from tests.oracle import assert_same, hand_masked, masked_patterns, oracle_of

WEIGHTS = "diffusion_pytorch_model.safetensors"
MID = "mid_block.resnets.0.conv1.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_unet(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def student(folder: Path) -> Any:
    """Returns a student that has been called once; tests leave it as it is."""
    config = sdm.SparseConfig(
        "2:4", keep_dense="down_blocks", overrides={"mid_block": "1:4"}, backend="eager"
    )
    model = UNet2DModel.from_pretrained(folder, quantization_config=config)
    run(model)
    return model


def load(folder: Path, pattern: str = "2:4", **options: Any) -> Any:
    config = sdm.SparseConfig(pattern, backend="eager", **options)
    return UNet2DModel.from_pretrained(folder, quantization_config=config)


def run_eagerly(model: Any) -> torch.Tensor:
    """Runs a model from a file, which does not hold a backend."""
    return run(sdm.compile(model, backend="eager"))


def read_record(folder: Path) -> Any:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return json.loads(file.metadata()["sparsedm"])


def test_model_when_loaded_with_a_config_is_the_compiled_one(student: Any) -> None:
    assert type(student) is UNet2DModel
    patterns = masked_patterns(student)
    assert str(patterns[MID]) == "1:4"
    assert {str(p) for name, p in patterns.items() if "mid_block" not in name} == {"2:4"}
    assert not any(name.startswith("down_blocks") for name in patterns)
    assert_same(run(student), run(oracle_of(student)))


def test_student_when_reloaded_without_a_config_is_the_same(student: Any, tmp_path: Path) -> None:
    student.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert saved["decisions"][MID] == "conv2d 1:4"
    assert saved["decisions"]["conv_in.weight"] == "conv2d dense: first op of the graph"
    again = UNet2DModel.from_pretrained(tmp_path)
    assert masked_patterns(again) == masked_patterns(student)
    assert {*sdm.explain(again).rows} == {*sdm.explain(student).rows}
    assert_same(run_eagerly(again), run(student))
    again.save_pretrained(tmp_path / "again")
    assert read_record(tmp_path / "again") == read_record(tmp_path)


def test_decisions_of_a_file_are_kept_where_another_policy_would_differ(
    student: Any, tmp_path: Path
) -> None:
    student.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["policy"] = "all"
    path.write_text(json.dumps(config))
    again = sdm.compile(UNet2DModel.from_pretrained(tmp_path), backend="eager")
    run(again)
    assert masked_patterns(again) == masked_patterns(student)


def test_student_when_saved_before_its_first_call_keeps_its_options(
    folder: Path, student: Any, tmp_path: Path
) -> None:
    load(folder, keep_dense=lambda name: "up_blocks" in name).save_pretrained(tmp_path)
    again = sdm.compile(UNet2DModel.from_pretrained(tmp_path), backend="eager")
    run(again)
    assert masked_patterns(again)
    assert not any(name.startswith("up_blocks") for name in masked_patterns(again))


def test_header_of_the_weights_holds_the_record_that_load_reads(
    student: Any, tmp_path: Path
) -> None:
    student.save_pretrained(tmp_path)
    record = read_record(tmp_path)
    assert (record["class"], record["decisions"][MID]) == ("UNet2DModel", "conv2d 1:4")
    loaded = sdm.load(tmp_path / WEIGHTS, small_unet(), backend="eager")
    assert_same(run(loaded), run(student))


def test_student_when_folded_and_saved_is_dense_with_zeros(student: Any, tmp_path: Path) -> None:
    fast = sdm.compile(student, mode="infer", backend="eager")
    out = run(fast)
    fast.save_pretrained(tmp_path)
    weight = load_file(tmp_path / WEIGHTS)[MID]
    assert weight.count_nonzero() * 4 == weight.numel()
    again = UNet2DModel.from_pretrained(tmp_path)
    assert not again.hf_quantizer.is_trainable
    assert_same(run_eagerly(again), out)
    assert student.config.quantization_config.config.mode == "train"


def test_zeros_of_a_checkpoint_are_recognized_without_a_pattern(
    student: Any, tmp_path: Path
) -> None:
    dense = hand_masked(small_unet(), masked_patterns(student))
    dense.save_pretrained(tmp_path)
    config = sdm.SparseConfig(mode="infer", backend="eager")
    fast = UNet2DModel.from_pretrained(tmp_path, quantization_config=config)
    assert_same(run(fast), run(dense))
    assert str(masked_patterns(fast)[MID]) == "1:4"
    with pytest.raises(sdm.ConfigError, match="without a pattern"):
        sdm.SparseConfig()


def test_pipeline_loads_the_parts_that_a_mapping_names(student: Any, tmp_path: Path) -> None:
    diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler(10)).save_pretrained(tmp_path)
    config = sdm.SparseConfig(
        "2:4", keep_dense="down_blocks", overrides={"mid_block": "1:4"}, backend="eager"
    )
    mapping = PipelineQuantizationConfig(quant_mapping={"unet": config})
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path, quantization_config=mapping)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8, 8, 3)
    assert masked_patterns(pipeline.unet) == masked_patterns(student)
    pipeline.save_pretrained(tmp_path / "sparse")
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path / "sparse")
    assert masked_patterns(again.unet) == masked_patterns(student)


BACKEND = {"quant_backend": "sparsedm", "quant_kwargs": {"pattern": "2:4", "backend": "eager"}}


def test_pipeline_loads_the_components_that_a_backend_prunes(tmp_path: Path) -> None:
    diffusers.DDPMPipeline(small_unet(), diffusers.DDPMScheduler(10)).save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(**BACKEND, components_to_quantize="unet")
    unet = diffusers.DDPMPipeline.from_pretrained(tmp_path, quantization_config=config).unet
    out = run(unet)
    assert_same(out, run(hand_masked(small_unet(), masked_patterns(unet))))


def test_backend_that_would_prune_a_text_encoder_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    heads = {"num_attention_heads": 1, "max_position_embeddings": 4}
    CLIPTextModel(CLIPTextConfig(**sizes, **heads)).save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(**BACKEND)._resolve_quant_config(is_diffusers=False)
    with pytest.raises(sdm.ConfigError, match=r"not text encoders .*components_to_quantize=\['tr"):
        CLIPTextModel.from_pretrained(tmp_path, quantization_config=config)


def load_single_file(folder: Path, **options: Any) -> Any:
    path = str(folder / WEIGHTS)
    return UNet2DConditionModel.from_single_file(path, config=str(folder), **options)


def test_single_file_is_loaded_pruned_by_the_argument_and_by_its_config(tmp_path: Path) -> None:
    UNET.build().save_pretrained(tmp_path / "dense")
    assert "forward" not in vars(load_single_file(tmp_path / "dense"))
    config = sdm.SparseConfig("2:4", backend="eager")
    student = load_single_file(tmp_path / "dense", quantization_config=config)
    assert_masked(student, run_unet(student))
    student.save_pretrained(tmp_path / "student")
    again = load_single_file(tmp_path / "student")
    assert masked_patterns(again) == masked_patterns(student)
    assert_same(again.conv_in.weight, student.conv_in.weight)
    half = load_single_file(tmp_path / "student", torch_dtype=torch.bfloat16)
    assert (half.dtype, masked_patterns(half)) == (torch.bfloat16, masked_patterns(student))


def test_new_model_from_the_config_of_a_pruned_one_is_pruned(
    folder: Path, student: Any, tmp_path: Path
) -> None:
    assert "forward" not in vars(UNet2DModel.from_config(UNet2DModel.load_config(folder)))
    student.save_pretrained(tmp_path / "student")
    saved = UNet2DModel.load_config(tmp_path / "student")
    for config in (student.config, saved):
        made, _ = UNet2DModel.from_config(config, return_unused_kwargs=True)
        made = made if config is student.config else sdm.compile(made, backend="eager")
        run(made)
        assert masked_patterns(made) == masked_patterns(student)
        assert not torch.equal(made.conv_in.weight, student.conv_in.weight)


@pytest.mark.parametrize("frozen", [False, True])
def test_average_that_diffusers_keeps_of_a_student_is_saved_pruned(
    frozen: bool, student: Any, tmp_path: Path
) -> None:
    if frozen:
        student = copy.deepcopy(student)
        sdm.freeze_masks(student)
        assert student.hf_quantizer.is_serializable
    average = EMAModel(student.parameters(), model_cls=UNet2DModel, model_config=student.config)
    average.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    assert masked_patterns(again) == masked_patterns(student)
    assert_same(run_eagerly(again), run(student))
    masks = sdm.get_masks(again)
    for name, mask in sdm.get_masks(student).items():
        assert_same(masks[name], mask)
        assert_same(again.get_parameter(name) * mask, student.get_parameter(name) * mask)


def test_one_config_for_two_models_keeps_them_apart(folder: Path, student: Any) -> None:
    config = sdm.SparseConfig("2:4", backend="eager")
    first = UNet2DModel.from_pretrained(folder, quantization_config=config)
    second = UNet2DModel.from_pretrained(folder, quantization_config=config)
    run(first)
    assert first.hf_quantizer.is_serializable
    assert first.config.quantization_config.decisions
    assert not config.decisions
    assert not second.config.quantization_config.decisions


@pytest.mark.parametrize(
    "options",
    [
        {"torch_dtype": torch.bfloat16},
        {"device_map": "cpu"},
        {"device_map": {"": "cpu"}},
        {"low_cpu_mem_usage": True},
    ],
    ids=str,
)
def test_model_when_loaded_in_another_way_holds_its_weights(
    folder: Path, options: dict[str, Any]
) -> None:
    config = sdm.SparseConfig("2:4", backend="eager")
    model = UNet2DModel.from_pretrained(folder, quantization_config=config, **options)
    dtype = options.get("torch_dtype", torch.float32)
    for name, tensor in small_unet().state_dict().items():
        assert_same(model.state_dict()[name], tensor.to(dtype))


def test_model_with_layers_on_disk_runs_as_its_oracle(folder: Path, tmp_path: Path) -> None:
    parts = {name: "disk" for name, _ in small_unet().named_children()}
    model = UNet2DModel.from_pretrained(
        folder,
        quantization_config=sdm.SparseConfig("2:4", backend="eager"),
        device_map={**parts, "conv_in": "cpu"},
        offload_folder=tmp_path,
    )
    with torch.no_grad():
        assert_same(run(model), run(hand_masked(small_unet(), masked_patterns(model))))


def test_sharded_model_is_loaded_and_saved(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    again = UNet2DModel.from_pretrained(tmp_path)
    assert again.hf_quantizer.quantization_config.config.pattern == sdm.Pattern.parse("2:4")
    assert_same(again.state_dict()[MID], small_unet().state_dict()[MID])


def test_model_casts_since_its_weights_are_plain(student: Any, recwarn: Any) -> None:
    cast = sdm.compile(student, backend="eager").to(torch.bfloat16)
    assert run(cast).dtype == torch.bfloat16
    assert masked_patterns(cast) == masked_patterns(student)


def test_training_step_through_the_plugin_moves_the_latent_weights(folder: Path) -> None:
    model = load(folder)
    assert model.hf_quantizer.is_trainable
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run(model).square().mean().backward()
    before = model.get_parameter(MID).detach().clone()
    optimizer.step()
    moved = model.get_parameter(MID) != before
    assert moved.all()  # pruned weights too, by the straight-through gradient


def test_attached_student_is_saved_with_its_decisions(student: Any, tmp_path: Path) -> None:
    compiled = sdm.compile(small_unet(), "1:4", backend="eager")
    run(compiled)
    compiled.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    attach(compiled)
    compiled.save_pretrained(tmp_path)
    assert masked_patterns(UNet2DModel.from_pretrained(tmp_path)) == masked_patterns(compiled)
    with pytest.raises(sdm.ConfigError, match="UNet2DModel is not a compiled model of diffusers"):
        attach(small_unet())
    with pytest.raises(sdm.ConfigError, match="Linear is not a compiled model"):
        attach(torch.nn.Linear(4, 4))


def test_frozen_masks_are_saved_and_loaded(student: Any, tmp_path: Path) -> None:
    frozen = copy.deepcopy(student)
    sdm.freeze_masks(frozen)
    with torch.no_grad():
        for name in sdm.masked_parameters(frozen):
            frozen.get_parameter(name).add_(0.01)  # of which pruned places are no part
    frozen.save_pretrained(tmp_path)
    weight = load_file(tmp_path / WEIGHTS)[MID]
    assert weight.count_nonzero() * 4 == weight.numel()
    again = UNet2DModel.from_pretrained(tmp_path)
    assert again._sparsedm.frozen.equals(frozen._sparsedm.frozen)
    assert {*again._sparsedm.frozen} == {*masked_patterns(student)}


def test_student_of_soft_thresholds_is_not_saved_without_them(student: Any, tmp_path: Path) -> None:
    soft = copy.deepcopy(student)
    patterns = dict(masked_patterns(soft))
    soft._sparsedm.frozen = SoftMasks({name: torch.ones(1) for name in patterns}, patterns)
    with pytest.raises(sdm.ConfigError, match="holds no soft thresholds"):
        soft.save_pretrained(tmp_path)


def test_config_takes_the_options_of_compile() -> None:
    taken = [*inspect.signature(sdm.compile).parameters]
    ours = [*inspect.signature(sdm.SparseConfig).parameters]
    assert ours == [name for name in taken if name not in ("model", "inplace")]


def test_dequantize_is_refused_with_the_way_out(student: Any) -> None:
    with pytest.raises(sdm.ConfigError, match="apply_masks"):
        student.dequantize()


def test_saved_model_without_the_plugin_is_refused_by_diffusers(
    student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student.save_pretrained(tmp_path)
    for table in list_tables():
        monkeypatch.delitem(table, METHOD)
    with pytest.raises(ValueError, match="Unknown quantization type, got sparsedm"):
        UNet2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "has version 99"),
        ({"pattern": "9:4"}, "damaged: .*9:4"),
        ({"mode": "both"}, "damaged: .*both"),
        ({"surprise": 1}, "damaged: .*surprise"),
        ({"decisions": 3}, "damaged"),
        ({"decisions": {"gone.weight": "linear 2:4"}}, "does not have 'gone.weight' and 0 more"),
        ({"decisions": {MID: "conv2d"}}, "damaged: 'conv2d' is no decision about"),
        ({"decisions": {MID: "conv2d 4:2"}}, "damaged: .*4:2"),
    ],
    ids=str,
)
def test_damaged_config_is_refused_before_anything_is_loaded(
    student: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    student.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(change)
    path.write_text(json.dumps(config))
    if "gone" in message:  # what fits no model is noticed before weights are put into it
        save_file({MID: torch.zeros(1)}, tmp_path / WEIGHTS)
    else:
        (tmp_path / WEIGHTS).write_bytes(b"never read")
    with pytest.raises(sdm.CheckpointError, match=message):
        UNet2DModel.from_pretrained(tmp_path)


def test_plain_dictionary_is_a_config(folder: Path) -> None:
    plain = {"quant_method": "sparsedm", "pattern": "1:4", "overrides": {"mid_block": "2:4"}}
    model = UNet2DModel.from_pretrained(folder, quantization_config=plain)
    options = model.hf_quantizer.quantization_config.config
    assert (str(options.pattern), options.policy) == ("1:4", "structural")


def test_wrong_option_is_refused_where_it_is_written(folder: Path) -> None:
    with pytest.raises(sdm.PatternError, match="5:4"):
        sdm.SparseConfig("5:4")
    with pytest.raises(sdm.ConfigError, match="mode 'fast'"):
        sdm.SparseConfig("2:4", mode="fast")
    with pytest.raises(sdm.ConfigError, match="names no parameter"):
        load(folder, keep_dense="nowhere")


def test_diffusers_without_the_tables_is_named_with_the_versions_that_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auto, "AUTO_QUANTIZER_MAPPING", ())
    with pytest.raises(sdm.ConfigError, match=f"is a tuple.*made for diffusers {TESTED}"):
        list_tables()
    monkeypatch.delattr(auto, "AUTO_QUANTIZER_MAPPING")
    with pytest.raises(sdm.ConfigError, match=r"has no diffusers\..*AUTO_QUANTIZER"):
        list_tables()


def test_diffusers_that_saves_without_asking_the_quantizer_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(DiffusersQuantizer, "get_state_dict_and_metadata")
    with pytest.raises(sdm.ConfigError, match=f"what to save.*made for diffusers {TESTED}"):
        import_base()


def test_private_api_of_the_installed_diffusers_is_the_one_the_plugin_overrides() -> None:
    """A red test here means: read the release notes, then adapt ``registration.TESTED``."""
    first, last = (tuple(map(int, text.split("."))) for text in TESTED.split(" to "))
    installed = tuple(map(int, diffusers.__version__.split(".")[:2]))
    assert first <= installed <= last
    own = {*vars(SparseQuantizer)} & {*vars(DiffusersQuantizer)} - {"__module__", "__doc__"}
    assert {
        "_process_model_before_weight_loading",
        "_process_model_after_weight_loading",
        "get_state_dict_and_metadata",
        "is_serializable",
        "is_trainable",
        "is_compileable",
        "get_cuda_warm_up_factor",
        "_dequantize",
    } <= own
    source = inspect.getsource(UNet2DModel.save_pretrained)
    asked, written = source.index(".is_serializable"), source.index(".save_config(")
    assert asked < written < source.index(".get_state_dict_and_metadata(")
    assert [table[METHOD] for table in list_tables()] == [SparseQuantizer, sdm.SparseConfig]


def test_copy_of_a_loaded_student_is_saved_as_itself(student: Any, tmp_path: Path) -> None:
    other = copy.deepcopy(student)
    assert other.hf_quantizer.model is other
    sdm.repattern(other, "1:2")
    other.save_pretrained(tmp_path / "other")
    student.save_pretrained(tmp_path / "own")
    patterns = [
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]["pattern"]
        for name in ("other", "own")
    ]
    assert patterns == ["1:2", "2:4"]
