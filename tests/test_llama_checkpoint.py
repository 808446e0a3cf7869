"""Saving and loading converted models with transformers' own functions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from llama_cases import FAMILIES, ids_of, make_converted, make_model, transformers
from safetensors.torch import load_file, save_file

from int8_ops._cache_names import cache_of
from int8_ops.llama import LatentAttention, LatentCache, LatentConfig
from int8_ops.llama.checkpoint import METHOD, LatentQuantizationConfig

pytestmark = pytest.mark.usefixtures("one_thread")

AutoModel = transformers.AutoModelForCausalLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a converted model, and its logits."""
    path = tmp_path_factory.mktemp("model")
    model = make_converted("qwen2", LatentConfig(kv_ratio=0.4, rank_multiple=8))
    model.save_pretrained(path)
    with torch.no_grad():
        return path, model(ids_of(2, 20)).logits


def copy_of(saved, tmp_path):
    for file in saved[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.no_grad()
def test_a_loaded_model_is_the_saved_one(family, tmp_path):
    model = make_converted(family)
    ids = ids_of(2, 20)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    assert sorted(f.suffix for f in tmp_path.iterdir() if f.name.startswith("model")) == [
        ".safetensors"
    ]
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    out = loaded(ids)
    assert torch.equal(out.logits, expected)
    assert type(cache_of(out)) is LatentCache
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(loaded.generate(ids, **options), model.generate(ids, **options))


@torch.no_grad()
def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    AutoModel.from_pretrained(saved[0]).save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(ids_of(2, 20)).logits, saved[1])


@torch.no_grad()
def test_with_a_device_map(saved):
    pytest.importorskip("accelerate")
    loaded = AutoModel.from_pretrained(saved[0], device_map="cpu")
    assert torch.equal(loaded(ids_of(2, 20)).logits, saved[1])


@torch.no_grad()
def test_another_dtype_casts_the_floats_alone(saved):
    loaded = AutoModel.from_pretrained(saved[0], dtype=torch.bfloat16)
    stored = load_file(saved[0] / "model.safetensors")
    for name, tensor in loaded.state_dict().items():
        if name.endswith(("A_int8", "A_scale_bits")):
            assert torch.equal(tensor, stored[name]), name
        else:
            assert tensor.dtype == torch.bfloat16, name
    got = loaded(ids_of(2, 20)).logits.float()
    assert float((got - saved[1]).norm() / saved[1].norm()) < 0.1


def test_the_configuration_says_how_latents_are_stored(saved):
    held = json.loads((saved[0] / "config.json").read_text())["quantization_config"]
    assert held["quant_method"] == METHOD
    assert len(held["layers"]) == 3
    config = LatentQuantizationConfig(**held)
    model = AutoModel.from_pretrained(saved[0])
    assert [layer.self_attn.spec for layer in model.model.layers] == list(config.specs())


@pytest.mark.parametrize(
    "name",
    [
        "layers.1.self_attn.k_proj.slices.0.A_int8",
        "layers.2.self_attn.v_proj.slices.0.A_scale_bits",
        "layers.0.self_attn.k_proj.BLinear.weight",
        "layers.0.self_attn.v_proj.bias",
    ],
)
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_damaged_checkpoint_is_refused(saved, tmp_path, name, damage):
    path = copy_of(saved, tmp_path)
    tensors = load_file(path / "model.safetensors")
    if damage == "missing":
        del tensors["model." + name]
    else:
        tensors["model." + name].view(-1)[0] += 100
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="damaged checkpoint") as error:
        AutoModel.from_pretrained(path)
    layer, projection = name.split(".")[1], name.split(".")[3]
    assert f"{projection} of layer {layer} is not what was saved" in str(error.value)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: held.update(format=2), "expected a checkpoint of format 1, got 2"),
        (lambda held: held.update(surprise=1), r"with \['surprise'\]"),
        (lambda held: held.update(layers=held["layers"][:2]), "of 3 layers, as the model has, got"),
        (lambda held: held["layers"][1].update(k=[[5, 8]]), r"layers\[1\]\.k: .*bits 4, 8 or 16"),
        (
            lambda held: held["layers"][1].update(groups=3),
            "divide the 4 KV heads of layer 1, got 3",
        ),
        (lambda held: held.update(fingerprints=[]), "expected fingerprints of 3 layers"),
        (lambda held: held.update(layers=[]), "expected layers in the quantization_config"),
    ],
)
def test_a_foreign_configuration_is_refused(saved, tmp_path, change, told):
    path = copy_of(saved, tmp_path)
    config = json.loads((path / "config.json").read_text())
    change(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        AutoModel.from_pretrained(path)


def test_another_architecture_is_refused(saved, tmp_path):
    held = json.loads((saved[0] / "config.json").read_text())["quantization_config"]
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32, "head_dim": 8}
    config = transformers.Gemma2Config(
        num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, **sizes
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    written["quantization_config"] = held
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(TypeError, match="Gemma2ForCausalLM cannot be converted"):
        AutoModel.from_pretrained(tmp_path)


def test_an_unconverted_model_cannot_be_quantized_on_loading(tmp_path):
    make_model().save_pretrained(tmp_path)
    layer = {"k": [[8, 8]], "v": [[8, 8]], "groups": 1, "flow": "integer"}
    held = LatentQuantizationConfig(layers=[layer] * 3, fingerprints=[{}] * 3)
    with pytest.raises(ValueError, match="pre-quantized"):
        AutoModel.from_pretrained(tmp_path, quantization_config=held)


def test_a_model_loaded_into_the_same_process_leaves_others_alone(saved):
    AutoModel.from_pretrained(saved[0])
    plain = make_model("qwen2")
    assert not any(isinstance(module, LatentAttention) for module in plain.modules())
    assert type(cache_of(plain(ids_of(1, 4)))) is not LatentCache


RUN = """
import sys
{first}
{second}
from transformers import AutoModelForCausalLM
import torch
model = AutoModelForCausalLM.from_pretrained({path!r})
print(type(model.model.layers[0].self_attn).__name__)
"""


@pytest.mark.parametrize(
    "order", [("import int8_ops", ""), ("import transformers", "import int8_ops")]
)
def test_importing_the_package_is_enough_in_either_order(saved, order):
    code = RUN.format(first=order[0], second=order[1], path=str(saved[0]))
    assert run(code).strip().splitlines()[-1] == "LatentQwen2Attention"


def test_importing_the_package_does_not_import_transformers():
    told = run(
        "import sys, int8_ops, int8_ops.llama\n"
        "assert 'convert' in dir(int8_ops.llama)\n"
        "print(sorted(m for m in sys.modules if m.partition('.')[0] == 'transformers'))"
    )
    assert told.strip() == "[]"


def test_a_missing_transformers_is_named():
    told = run(
        "import sys; sys.modules['transformers'] = None\n"
        "import int8_ops\n"
        "try:\n    int8_ops.llama.convert\n"
        "except ImportError as error:\n    print(error)\n"
    )
    assert "int8_ops.llama.convert needs transformers 4.56 or newer" in told


def run(code: str) -> str:
    root = str(Path(__file__).resolve().parent.parent)
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
